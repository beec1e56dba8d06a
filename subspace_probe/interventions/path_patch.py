"""Path patching: what one site tells another directly, and not by way of what lies between them.

Wang et al. 2022, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.edits import EditContext, EditMap, Stacked
from subspace_probe.core.errors import DataError, PositionError, SiteError, unknown
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import ModelSpec
from subspace_probe.core.sites import Site, SitesLike, resolve_sites
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST, TokenBatch, Where
from subspace_probe.interventions.patch import Align, Patch
from subspace_probe.interventions.sources import Source
from subspace_probe.models.capturing import Limits, batches
from subspace_probe.models.hooked import HookedModel, PromptsLike, as_prompts

Component = Literal["attn_out", "mlp_out"]
"""What writes to the residual stream, and so can be frozen."""

_PROJECTED = {"z": "attn_out", "mlp_post": "mlp_out"}
"""What a sender inside a component leaves it through; frozen, nothing of the sender would get out."""


def component(name: str) -> Component:
    """Check a component's name.

    Raises:
        UnknownName: with the nearest match and the list.
    """
    if name not in get_args(Component):
        raise unknown("component", name, get_args(Component))
    return name  # pyright: ignore[reportReturnType]  (narrowed by the line above)


def path_patch(
    model: HookedModel,
    prompts: PromptsLike,
    source_prompts: PromptsLike,
    sender: Site | str,
    receiver: SitesLike,
    *,
    where: Where = LAST,
    receiver_where: Where | None = None,
    source_where: Where | None = None,
    freeze: Sequence[str] = ("attn_out", "mlp_out"),
    subspace: Subspace | None = None,
    align: Align | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> Patch:
    """The patch that gives the receiver what it would get, were the sender's state another prompt's, along one path.

    The prompts are run with the sender's state replaced by that of `source_prompts`, and every frozen component
    between sender and receiver held at its clean value, at all tokens. The states found at the receiver are the
    result: a `Patch`, to be run on the same prompts with nothing frozen, so that it can be measured, stacked and
    saved as any other. With both components frozen that is the direct path; with `freeze=("attn_out",)` MLPs are
    recomputed, as in Wang et al.; with `freeze=()` all paths between the two are in it.

    Receivers are states, not the inputs of queries, keys and values. `resid_pre` and `resid_mid` stand for all that is
    read from the stream there or later, as `resid_post` of the last block does for the logits. `z` of a head, the
    output of its attention before the output projection, takes what reaches the head through its queries, keys and
    values at once, and so does `attn_out` for a whole layer; `mlp_post` and `mlp_out` are what an MLP makes of it.
    Several receivers each get what they would get alone: none of them hears the sender through another one that is
    frozen.

    Args:
        prompts: the bases: clean ones for noising, corrupt ones for denoising.
        source_prompts: one for each base, in the same order.
        sender: one site; `L9.z.h6` is one head.
        receiver: one or several sites behind it.
        where: tokens at which the sender is replaced.
        receiver_where: tokens at which the receiver's states are taken and put; those of the sender by default.
        source_where: tokens of the source prompts that the states are taken from; `where` by default.
        freeze: which components between the two stay as they are: "attn_out", "mlp_out", both or none.
        subspace: replace only the component of the sender's state that lies in it.
        align: which of the source's tokens is for which of the base's, where there are several; see `Patch`.
        batch_tokens: how many tokens, pads included, one pass may have; each prompt is in it twice.

    Returns:
        A patch of the receiver, whose source's notes say which path it is.

    Raises:
        SiteError: a receiver that the sender cannot reach, or a site that this model does not have.
        DataError: not one source prompt for each prompt.
        PositionError: tokens that a prompt does not have, or in other numbers than its source.
    """
    spec = model.spec
    start = (Site.parse(sender) if isinstance(sender, str) else sender).resolve(spec.n_layers)
    ends = resolve_sites(receiver, spec.n_layers)
    for site in (start, *ends):
        model.backend.width(site)  # names what this family does not have
    for end in ends:
        _require_path(spec, start, end)
    frozen: tuple[Component, ...] = tuple(component(name) for name in freeze)
    shown, given = as_prompts(prompts), as_prompts(source_prompts)
    if len(shown) != len(given):
        raise DataError(
            f"{len(given)} source prompts were given for {len(shown)} prompts. Give one for each, in order."
        )
    acts = model.capture(given, sites=[start], where=source_where or where, batch_tokens=batch_tokens)
    put = Patch(Source.of(acts), where, subspace, align=align)
    model.check(put)
    _require_later(model.tokens(shown), where, receiver_where or where)
    path = _Path(start, ends, put.edits(spec.n_layers), receiver_where or where, frozen)
    states, prompt = _all_received(model, shown, path, Limits(max(1, batch_tokens // 2)), progress)
    notes = {"sender": start.short, "where": str(where), "frozen": list(frozen)}
    return Patch(Source(states, prompt, path.where, notes={**put.source.notes, "path": notes}), path.where)


@final
@dataclass(frozen=True, eq=False)
class _Path:
    """From where to where, what is sent, at which tokens it is received, and what stays as it is."""

    start: Site
    ends: Sequence[Site]
    sent: EditMap
    where: Where
    freeze: Sequence[Component]

    def between(self, end: Site) -> list[Site]:
        """The components that are frozen on the way to one receiver."""
        sites = [Site(layer, name) for layer in range(self.start.layer, end.layer + 1) for name in self.freeze]
        own = (self.start.layer, _PROJECTED.get(self.start.stream))
        inside = [site for site in sites if self.start.order < site.order < end.order]
        return [site for site in inside if (site.layer, site.stream) != own]


def _all_received(
    model: HookedModel, prompts: Sequence[Prompt], path: _Path, limits: Limits, progress: bool
) -> tuple[dict[Site, Float[Tensor, "rows width"]], Int[Tensor, " rows"]]:
    """What each receiver gets, one row a token, and the prompt of each row.

    Raises:
        PositionError: no prompt has a token at which it is taken.
    """
    batch = model.tokens(prompts)
    counts = (batch.select(path.where, batch.positions) & batch.mask).sum(-1)
    starts, n = counts.cumsum(0) - counts, int(counts.sum())
    if n == 0:
        raise PositionError(f"No token of these prompts is {str(path.where)!r}, so the receiver has nothing to take.")
    states: dict[Site, Tensor] = {}
    with tqdm(total=batch.size, desc="paths", unit="prompt", disable=not progress, leave=False) as bar:
        for rows in batches(batch.lengths.tolist(), limits):
            places = torch.cat([torch.arange(int(counts[row])) + starts[row] for row in rows])
            for site, found in _received(model, batch.rows(rows), path).items():
                kept = states.setdefault(site, torch.empty(n, found.shape[1], dtype=found.dtype))
                kept[places] = found.cpu()
            bar.update(len(rows))
    return states, torch.arange(batch.size).repeat_interleave(counts)


def _received(model: HookedModel, batch: TokenBatch, path: _Path) -> dict[Site, Float[Tensor, "n width"]]:
    """What each receiver gets of one batch; the clean prompts and those with another sender share a pass."""
    open_ends = [end for end in path.ends if end.stream not in path.freeze]
    # a receiver that is itself frozen on the way to others has a pass of its own, in which it is not
    passes = [open_ends] * bool(open_ends) + [[end] for end in path.ends if end.stream in path.freeze]
    sent: EditMap = {site: Stacked([None, edit], batch) for site, edit in path.sent.items()}
    twice, found = batch.repeat(2), dict[Site, Tensor]()
    for reads in passes:
        last = reads[-1]
        held = {site: _Held() for site in path.between(last)}
        run = model.run(twice, reads=reads, writes={**sent, **held}, stop_after=last, where=path.where)
        found |= {site: states[len(states) // 2 :] for site, states in run.reads.items()}
    return found


def _require_path(spec: ModelSpec, start: Site, end: Site) -> None:
    """Check that what is sent at one site can arrive at the other.

    Raises:
        SiteError: it cannot.
    """
    if start.lifted(spec.n_layers) == end.lifted(spec.n_layers):
        same = f"{start.short} and {end.short} are one state" if start != end else f"{end.short} is the sender itself"
        raise SiteError(f"There is no path from {start.short} to {end.short}: {same}. Use Patch for it.")
    if end.order <= start.order:
        raise SiteError(
            f"There is no path from {start.short} to {end.short}, which is computed {_when(start, end)}. Name a "
            "receiver behind the sender."
        )
    in_attention, in_mlp = start.stream in ("z", "attn_out"), end.stream in ("mlp_post", "mlp_out")
    if start.layer == end.layer and in_attention and in_mlp and "resid_mid" in spec.unsupported:
        raise SiteError(
            f"There is no path from {start.short} to {end.short}: {spec.family} computes attention and MLP of a layer "
            "from the same state. Name a receiver in a later layer."
        )


def _when(start: Site, end: Site) -> str:
    return "at the same time" if start.order == end.order else "before it"


@final
@dataclass(frozen=True, eq=False)
class _Held:
    """The second copy of the batch is given the first one's states, which are the clean ones."""

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        clean = x[: len(x) // 2]
        return torch.cat([clean, clean])


def _require_later(batch: TokenBatch, sender: Where, receiver: Where) -> None:
    """No path leads back to an earlier token."""
    first, last = (
        (batch.positions.masked_fill(~tokens, fill), tokens)
        for tokens, fill in (
            (batch.select(sender, batch.positions) & batch.mask, batch.positions.shape[1]),
            (batch.select(receiver, batch.positions) & batch.mask, -1),
        )
    )
    behind = last[0].amax(-1) < first[0].amin(-1)
    if bool((behind & first[1].any(-1) & last[1].any(-1)).any()):
        row = int(behind.nonzero()[0, 0])
        raise PositionError(
            f"In prompt {row} every token at {str(receiver)!r} stands before those at {str(sender)!r}, and nothing "
            f"leads back to it. Choose a receiver at the same token or a later one. The prompt is: {batch.texts[row]!r}"
        )
