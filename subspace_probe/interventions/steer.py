"""Steering: add a direction to the activations of one site."""

import math
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from subspace_probe.core.edits import At, EditMap
from subspace_probe.core.errors import ConfigError, SiteError
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import ACTIVATION, Subspace
from subspace_probe.core.tokens import ALL, Where


@final
@dataclass(frozen=True, eq=False)
class Steer:
    """Add `strength` times the direction's own natural step: x + strength * sum_i scale_i basis_i.

    With a mean difference, strength 1 moves a state by the gap between the class means, as published (Arditi et al.
    2024, eq. 3; Zhao et al. 2025). A negative strength moves it back.

    Args:
        subspace: the direction.
        strength: in units of the subspace's `scale`.
        site: where to add it; default is where it was found.
        where: to which tokens; default all, generated ones included, as in published refusal steering. Reply
            inversion uses the instruction only.
    """

    subspace: Subspace
    strength: float = 1.0
    site: Site | None = None
    where: Where = ALL

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ConfigError(f"The strength is {self.strength}. It must be a finite number.")
        if self.subspace.scale_unit != ACTIVATION:
            raise ConfigError(
                f"The subspace's steps are in units of {self.subspace.scale_unit}, so a strength would mean nothing. "
                "Give it steps in activation units: subspace.with_scale([...])."
            )
        if self.site is None and self.subspace.site is None:
            raise SiteError("The subspace does not say where it was found. Pass site=Site(layer).")

    def edits(self, n_layers: int) -> EditMap:
        """One edit, at one site."""
        site = self.site or self.subspace.site
        if site is None:  # __post_init__ has checked; for the type checker
            return {}
        step = self.strength * (self.subspace.scale[:, None] * self.subspace.basis).sum(0)

        def change(x: Tensor, rows: Tensor) -> Tensor:
            return x + step.to(x.device, x.dtype)

        return {site.resolve(n_layers): At(self.where, change)}

    def with_subspace(self, subspace: Subspace) -> "Steer":
        """The same operation along another subspace, at the same place."""
        return replace(self, subspace=subspace, site=self.site or self.subspace.site)

    def with_strength(self, strength: float) -> "Steer":
        """The same operation at another strength."""
        return replace(self, strength=strength)

    def __repr__(self) -> str:
        site = self.site or self.subspace.site
        return f"Steer({self.strength:+g} at {site.short if site else '?'}, {self.where})"
