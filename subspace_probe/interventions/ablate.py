"""Ablation: take a subspace, or the whole state, out of the places that carry it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from subspace_probe.core.edits import At, EditMap
from subspace_probe.core.errors import SiteError
from subspace_probe.core.protocols import Part
from subspace_probe.core.sites import Everywhere, Site, SitesLike, resolve_sites
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import ALL, Where
from subspace_probe.interventions.patch import Align, Patch
from subspace_probe.interventions.sources import Source

PUBLISHED = Everywhere(("resid_pre", "attn_out", "mlp_out"))
"""Every block's input, attention output and MLP output, so that nothing can write the direction back."""


@final
@dataclass(frozen=True, eq=False)
class Ablate:
    """Project the subspace out of the raw state: x - U^T U x (Arditi et al. 2024, eq. 4).

    The subspace's `origin` is ignored, as published: the coordinate becomes 0. With `to` it becomes that of other
    states instead, a mean (mean ablation) or another prompt's (resampling). Without a subspace the whole state is
    set, to 0 or to those states.

    Args:
        subspace: what is taken out; None for the whole state.
        sites: where; by default, of a subspace, everywhere that writes to the stream, at every layer, or the sites of
            `to`.
        where: which tokens; default all, decoding steps included.
        to: what is put in its place: `Source.mean(acts)`, `Source.resampled(acts)`; nothing (zero) by default.
        align: as in `Patch`, where `to` holds a row for every token.
    """

    subspace: Subspace | None = None
    sites: SitesLike | None = None
    where: Where = ALL
    to: Source | None = None
    align: Align | None = None

    def __post_init__(self) -> None:
        if self.subspace is not None:
            # a projector of its own (LEACE) belongs to one site and its own origin: `subspace.reject` applies it
            self.subspace.require_projection("ablated along its basis alone")
        elif self.sites is None and self.to is None:
            raise SiteError(
                "Whole states were to be set to zero at no site in particular. Name sites, such as Site(2)."
            )

    def edits(self, n_layers: int) -> EditMap:
        """One edit at every site."""
        if self.to is not None:
            return self._patch(self.to, n_layers).edits(n_layers)

        def change(x: Tensor, prompts: Tensor) -> Tensor:
            if self.subspace is None:
                return torch.zeros_like(x)
            # in float32 at least, and rounded once: a rounded basis leaves more behind than rounded states do
            basis = self.subspace.basis.to(x.device, torch.promote_types(x.dtype, torch.float32))
            states = x.to(basis)
            return states - (states @ basis.T) @ basis

        return {site: At(self.where, change) for site in self._sites(n_layers)}

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """The subspace and the states put in its place, at every site."""
        if self.to is not None:
            return self._patch(self.to, n_layers).parts(n_layers)
        return [] if self.subspace is None else [(site, self.subspace) for site in self._sites(n_layers)]

    def with_subspace(self, subspace: Subspace) -> "Ablate":
        """The same operation on another subspace."""
        return replace(self, subspace=subspace)

    def _sites(self, n_layers: int) -> tuple[Site, ...]:
        return resolve_sites(PUBLISHED if self.sites is None else self.sites, n_layers)

    def _patch(self, to: Source, n_layers: int) -> Patch:
        """What ablation to other states is: their component in the place of the model's own."""
        source = to.resolve(n_layers)
        if self.sites is not None:
            source = source.only(resolve_sites(self.sites, n_layers))
        return Patch(source, self.where, self.subspace, align=self.align)

    def __repr__(self) -> str:
        what = "the whole state" if self.subspace is None else repr(self.subspace)
        return f"Ablate({what}{'' if self.to is None else f', to {self.to!r}'}, {self.where})"
