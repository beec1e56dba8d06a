"""Rerouting: move states in closed form to where other states are."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.edits import At, EditMap
from subspace_probe.core.errors import PositionError, RankError, SiteError
from subspace_probe.core.protocols import Part
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.interventions.moves import Move
from subspace_probe.interventions.targets import HalfSpace
from subspace_probe.linalg import projections


@final
@dataclass(frozen=True, eq=False)
class Reroute:
    """Move states into a half-space by the shortest way, or from one subspace to another.

    Half-space: x + max(0, m - b - w . x) s with w . s = 1, so that a state outside ends exactly on the margin and one
    inside is left as it is; s = w / |w|^2 is the shortest move, s = S w / (w . S w) that of least Mahalanobis length
    (`HalfSpace.with_covariance`). Move: by the rotation of paired coordinates, or by the optimal transport of unpaired
    ones, within a subspace, between two, or of whole states (`Move`). To set coordinates to stated values, see
    `KnobClamp`.

    Args:
        target: where to.
        site: where in the model; default is where the target was found.
        where: which tokens; default those the target was found at.
        along: a control: the displacement is read as before, and its coordinates in the target's own subspace are
            written along this one instead, so that every state moves as far, elsewhere.
    """

    target: HalfSpace | Move
    site: Site | None = None
    where: Where = field(default=None)  # pyright: ignore[reportAssignmentType]  (filled in below)
    along: Subspace | None = None

    def __post_init__(self) -> None:
        if self.site is None and self.target.site is None:
            raise SiteError("The target does not say where it was found. Pass site=Site(layer).")
        if self.where is None:  # pyright: ignore[reportUnnecessaryComparison]
            if self.target.where is None:
                raise PositionError("The target does not say at which tokens it was found. Pass where=LAST or another.")
            object.__setattr__(self, "where", self.target.where)
        if self.along is not None:
            self.along.require_projection("written along")
            rank = self.target.subspace.rank
            if self.along.rank != rank:
                raise RankError(
                    f"States are displaced in {rank} dimensions, which cannot be written along a subspace of rank "
                    f"{self.along.rank}. Give one of rank {rank}."
                )

    @property
    def subspace(self) -> Subspace:
        """Where states are displaced; the normal of a half-space, unless another way was asked for."""
        return self.along or self.target.subspace

    def edits(self, n_layers: int) -> EditMap:
        """One edit, at one site."""
        if (site := self.site or self.target.site) is None:  # __post_init__ has checked; for the type checker
            return {}
        read = None if self.along is None else self.target.subspace.basis

        def change(x: Float[Tensor, "n d"], prompt: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
            moved = self.target.displacement(x)
            if self.along is not None and read is not None:
                moved = projections.lift(projections.coords(moved, read.to(moved)), self.along.basis.to(moved))
            return (x + moved).to(x.dtype)

        return {site.resolve(n_layers): At(self.where, change)}

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """What the target was made from, and the subspace written along, at the site."""
        used: list[Part] = [*self.target.parts, *([] if self.along is None else [self.along])]
        return [(site, part) for site in self.edits(n_layers) for part in used]

    def with_subspace(self, subspace: Subspace) -> "Reroute":
        """Every state moved as far as before, along another subspace of the same rank: with a random one, a control."""
        return replace(self, along=subspace)

    def wrong_way(self) -> "Reroute":
        """Every state moved as far as before in the opposite direction: a control."""
        return self.with_subspace(-self.subspace)

    def __repr__(self) -> str:
        site = self.site or self.target.site
        along = "" if self.along is None else f", along {self.along!r}"
        return f"Reroute({self.target!r} at {site.short if site else '?'}, {self.where}{along})"
