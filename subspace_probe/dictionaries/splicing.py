"""Put a sparse autoencoder into the forward pass: read a state as latents, change them, write it back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.edits import At, EditContext, EditMap
from subspace_probe.core.errors import ShapeError, SiteError
from subspace_probe.core.protocols import ModelSpec
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import ALL, Where
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder

Change = Callable[[Float[Tensor, "n d_sae"]], Float[Tensor, "n d_sae"]]
"""From the latents of n tokens to other latents; out of place."""


@runtime_checkable
class Host(Protocol):
    """What `Splice.at` asks of a model: a backend."""

    @property
    def spec(self) -> ModelSpec: ...
    def width(self, site: Site) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Splice:
    """An edit that takes states through a sparse autoencoder; see `splice`."""

    sae: SparseAutoencoder
    change: Change | None = None
    where: Where = ALL
    error: bool = True

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        """The edited states.

        Raises:
            ShapeError: states of another width than the autoencoder's, or a `change` that returns another shape.
        """
        self.sae.require_width(x.shape[-1])
        return At(self.where, self._through)(x, ctx)

    def at(self, host: Host, site: Site | None = None) -> EditMap:
        """This edit at a site of a model, for `model.run(batch, writes=...)`; all that can be is checked beforehand.

        Args:
            host: the model's backend, `model.backend`.
            site: default is where the autoencoder was trained.

        Raises:
            SiteError: the autoencoder was trained at another site, or does not say where and no site was given; the
                model has no such layer.
            ShapeError: states of another width.
        """
        if (chosen := site or self.sae.site) is None:
            raise SiteError(
                f"The autoencoder does not say where it was trained (hook_name "
                f"{self.sae.metadata.get('hook_name')!r}). Pass site=Site(layer)."
            )
        chosen = chosen.resolve(host.spec.n_layers)
        self.sae.require_site(chosen)
        self.sae.require_width(host.width(chosen))
        return {chosen: self}

    def _through(self, x: Tensor, rows: Tensor) -> Tensor:
        latents = self.sae.encode(x)
        changed = latents if self.change is None else self.change(latents)
        if changed.shape != latents.shape:
            raise ShapeError(
                f"The change of a spliced autoencoder returned shape {tuple(changed.shape)} for latents of shape "
                f"{tuple(latents.shape)}. It must keep the shape: one row a token, one column a latent."
            )
        if not self.error:
            return self.sae.decode(changed, x)
        # decode(changed) + (x - decode(latents)); what the two decodings share is never added, so nothing is rounded
        return x + (self.sae.gain(x) * ((changed - latents) @ self.sae.decoder)).to(x.dtype)


def splice(sae: SparseAutoencoder, change: Change | None = None, *, where: Where = ALL, error: bool = True) -> Splice:
    """Replace states by what a sparse autoencoder makes of them, with its latents changed on the way.

    With the error term, x + decode(change(f)) - decode(f) for f = encode(x): without a change the state is left as it
    was, bit for bit, and setting one latent to zero takes off exactly its activation times its decoder row. Gradients
    are those of this very function, through `encode` as well (no part of it is held constant).

    Args:
        change: from the latents of the selected tokens [n, d_sae] to those written back; None leaves them.
        where: which tokens; default all, decoding steps included.
        error: add what the autoencoder does not reconstruct. False gives the pure reconstruction.

    Returns:
        An edit: `model.run(batch, writes={site: edit})`, or `writes=edit.at(model.backend)`, which checks the site.
    """
    return Splice(sae, change, where, error)
