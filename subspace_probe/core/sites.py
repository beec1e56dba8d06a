"""Where in the network: a layer and a stream. Not where in the text: see `tokens.Where`.

Streams are defined by identities, not by module names:

    resid_mid = resid_pre + attn_out      resid_post = resid_mid + mlp_out      resid_pre[l+1] = resid_post[l]

so `attn_out` is *what is added to the stream*, after any norm that a family puts behind its attention. `z` is the input
of the attention's output projection, `mlp_post` the input of the MLP's down projection,
`pattern` the attention probabilities, which can be read and not edited.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, final, get_args

from subspace_probe.core.errors import SiteError, unknown

Stream = Literal["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z", "mlp_post", "pattern"]

FORWARD_ORDER: tuple[Stream, ...] = (
    "resid_pre",
    "pattern",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_post",
    "mlp_out",
    "resid_post",
)
"""The order in which one block computes its streams."""

READ_ONLY: frozenset[Stream] = frozenset({"pattern"})
"""Streams without a state for every token: attention patterns, [batch, head, pos, pos]."""

RESIDUAL: tuple[Stream, ...] = ("resid_pre", "resid_mid", "resid_post")
"""The states of the residual stream, as opposed to what is added to it."""

_TL = {"attn.hook_z": "z", "mlp.hook_post": "mlp_post", "attn.hook_pattern": "pattern"}
_TL_NAME = re.compile(r"blocks\.(?P<layer>-?\d+)\.(?P<rest>.+)")
_SHORT_NAME = re.compile(r"L(?P<layer>-?\d+)\.(?P<stream>\w+?)(?:\.h(?P<head>\d+))?")


def stream(name: str) -> Stream:
    """Check a stream's name.

    Raises:
        UnknownName: with the nearest match and the list.
    """
    if name not in get_args(Stream):
        raise unknown("stream", name, get_args(Stream))
    return name  # pyright: ignore[reportReturnType]  (narrowed by the line above)


@final
@dataclass(frozen=True)
class Site:
    """One stream of one block.

    Args:
        layer: block index from 0; negative counts from the last block once `resolve` knows how many there are.
        stream: which tensor of the block.
        head: one attention head of `z` or `pattern`; None for the whole stream.

    >>> str(Site(12)), Site.parse("L3.attn_out")
    ('blocks.12.hook_resid_post', Site(layer=3, stream='attn_out', head=None))
    """

    layer: int
    stream: Stream = "resid_post"
    head: int | None = None

    def __post_init__(self) -> None:
        stream(self.stream)
        if self.head is not None and self.stream not in ("z", "pattern"):
            raise SiteError(
                f"A head was asked for at {self.stream!r}, but only 'z' and 'pattern' have heads. Use stream='z'."
            )

    @classmethod
    def parse(cls, name: str) -> "Site":
        """Read `blocks.12.hook_resid_post` (TransformerLens), `L12.resid_post` or `L12.z.h3`."""
        if match := _TL_NAME.fullmatch(name):
            rest = match["rest"]
            return cls(int(match["layer"]), stream(_TL.get(rest, rest.removeprefix("hook_"))))
        if match := _SHORT_NAME.fullmatch(name):
            head = match["head"]
            return cls(int(match["layer"]), stream(match["stream"]), None if head is None else int(head))
        raise SiteError(f"Cannot read the site {name!r}. Write 'L12.resid_post' or 'blocks.12.hook_resid_post'.")

    def resolve(self, n_layers: int) -> "Site":
        """The same site with a layer counted from the front.

        Raises:
            SiteError: the model has no such layer.
        """
        if not -n_layers <= self.layer < n_layers:
            raise SiteError(
                f"Layer {self.layer} was asked for, but the model has {n_layers} layers. "
                f"Use 0 to {n_layers - 1}, or -{n_layers} to -1."
            )
        return self if self.layer >= 0 else replace(self, layer=self.layer + n_layers)

    def lifted(self, n_layers: int, taken: Collection["Site"] = ()) -> "Site":
        """`resid_post[l]` under its other name, `resid_pre[l + 1]`, so that block l need not run again; else itself.

        Args:
            taken: sites that something else edits; both names of one tensor must not be used at once.
        """
        above = Site(self.layer + 1, "resid_pre")
        return above if self.stream == "resid_post" and above.layer < n_layers and above not in taken else self

    @property
    def order(self) -> tuple[int, int]:
        """Sort key in the order of the forward pass."""
        return self.layer, FORWARD_ORDER.index(self.stream)

    @property
    def short(self) -> str:
        """`L12.resid_post`, the form figures and tables use."""
        head = "" if self.head is None else f".h{self.head}"
        return f"L{self.layer}.{self.stream}{head}"

    def __str__(self) -> str:
        inner = {name: key for key, name in _TL.items()}.get(self.stream, f"hook_{self.stream}")
        return f"blocks.{self.layer}.{inner}"


@final
@dataclass(frozen=True)
class Everywhere:
    """A stream at all layers, or at some, to be resolved once the model is known: `resid_post()`."""

    streams: tuple[Stream, ...]
    layers: tuple[int, ...] | None = None

    def sites(self, n_layers: int) -> tuple[Site, ...]:
        """The sites it stands for, in forward order."""
        layers = range(n_layers) if self.layers is None else self.layers
        found = {Site(layer, name).resolve(n_layers) for layer in layers for name in self.streams}
        return tuple(sorted(found, key=lambda site: site.order))


def resid_post(*layers: int) -> Everywhere:
    """The residual stream after the given blocks; after every block without arguments."""
    return Everywhere(("resid_post",), layers or None)


def resid_pre(*layers: int) -> Everywhere:
    """The residual stream before the given blocks; before every block without arguments."""
    return Everywhere(("resid_pre",), layers or None)


SitesLike = Site | Everywhere | str | list[Site] | list[str] | tuple[Site | str, ...]


def resolve_sites(sites: SitesLike, n_layers: int) -> tuple[Site, ...]:
    """Turn what users write into a tuple of sites in forward order, without repeats.

    Raises:
        SiteError: an empty selection or a layer the model does not have.
    """
    if isinstance(sites, str):
        # a bare stream name means that stream at every layer
        sites = Site.parse(sites) if "." in sites else Everywhere((stream(sites),))
    if isinstance(sites, Everywhere):
        return sites.sites(n_layers)
    if isinstance(sites, Site):
        sites = [sites]
    listed = [site for part in sites for site in ([part] if isinstance(part, Site) else resolve_sites(part, n_layers))]
    if not listed:
        raise SiteError("No sites were given. Name at least one, for instance Site(2) or resid_post().")
    # heads of one stream have one place in the forward pass, and must have one order in every process
    by_head = sorted(
        {site.resolve(n_layers) for site in listed}, key=lambda site: -1 if site.head is None else site.head
    )
    return tuple(sorted(by_head, key=lambda site: site.order))
