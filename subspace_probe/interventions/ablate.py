"""Directional ablation: take a subspace out of the residual stream."""

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from subspace_probe.core.edits import At, EditMap
from subspace_probe.core.sites import Everywhere, SitesLike, resolve_sites
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import ALL, Where

PUBLISHED = Everywhere(("resid_pre", "attn_out", "mlp_out"))
"""Every block's input, attention output and MLP output, so that nothing can write the direction back."""


@final
@dataclass(frozen=True, eq=False)
class Ablate:
    """Project the subspace out of the raw state: x - U^T U x (Arditi et al. 2024, eq. 4).

    The subspace's `origin` is ignored, as published: the coordinate becomes 0, not the mean.

    Args:
        subspace: what is taken out.
        sites: where; default is everywhere that writes to the stream, at every layer.
        where: which tokens; default all, decoding steps included.
    """

    subspace: Subspace
    sites: SitesLike = PUBLISHED
    where: Where = ALL

    def __post_init__(self) -> None:
        # a projector of its own (LEACE) belongs to one site and its own origin: `subspace.reject` applies it
        self.subspace.require_projection("ablated along its basis alone")

    def edits(self, n_layers: int) -> EditMap:
        """One edit at every site."""

        def change(x: Tensor, rows: Tensor) -> Tensor:
            basis = self.subspace.basis.to(x.device, x.dtype)
            return x - (x @ basis.T) @ basis

        return {site: At(self.where, change) for site in resolve_sites(self.sites, n_layers)}

    def with_subspace(self, subspace: Subspace) -> "Ablate":
        """The same operation on another subspace."""
        return replace(self, subspace=subspace)

    def __repr__(self) -> str:
        return f"Ablate({self.subspace!r}, {self.where})"
