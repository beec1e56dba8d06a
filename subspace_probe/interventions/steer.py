"""Steering: add a direction to the activations of one site."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.edits import EditMap
from subspace_probe.core.errors import ConfigError, DataError, SiteError
from subspace_probe.core.protocols import Part
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import ACTIVATION, Subspace
from subspace_probe.core.tokens import ALL, Where
from subspace_probe.interventions.rules import Rule, ruled

Unit = Literal["scale", "norm", "raw"]
UNITS: dict[Unit, str] = {
    "scale": "units of the direction's scale",
    "norm": "shares of each state's norm",
    "raw": "activation units",
}
"""What a strength may be measured in, in words."""


@final
@dataclass(frozen=True, eq=False)
class Steer:
    """Add a multiple of the direction's own natural step s = sum_i scale_i basis_i to states.

    By `unit`, a state x becomes

        "scale"     x + strength * s
        "norm"      x + strength * |x| * s / |s|
        "raw"       x + strength * s / |s|

    so that the unit decides how far, never whereto. With a mean difference, strength 1 in units of the scale moves a
    state by the gap between the class means, as published (Arditi et al. 2024, eq. 3; Zhao et al. 2025). A negative
    strength moves it back.

    Several at one site apply one after the other. In "scale" and "raw" they add, whatever their order; with "norm" and
    `keep_norm` each sees the state that the one before it left.

    Args:
        subspace: the direction.
        strength: one number, or one for each prompt of the call.
        site: where to add it; default is where it was found.
        where: to which tokens; default all, generated ones included, as in published refusal steering. Reply
            inversion uses the instruction only.
        unit: what the strength is measured in.
        keep_norm: give the steered state the norm it had before, so that only its direction changes.
        when: of these tokens, only those that the rule allows: `Score`, `AllOf`, `AnyOf`, `Not`.
    """

    subspace: Subspace
    strength: float | Sequence[float] | Float[Tensor, " n"] = 1.0
    site: Site | None = None
    where: Where = ALL
    unit: Unit = "scale"
    keep_norm: bool = False
    when: Rule | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strength, str):
            raise ConfigError(
                f"The strength is {self.strength!r}, a text. It must be a number, or one for each prompt."
            )
        # one form, which JSON has: a number, or a tuple of them
        given = torch.as_tensor(self.strength, dtype=torch.float64)
        plain = tuple(given.flatten().tolist()) if given.ndim else float(given)
        object.__setattr__(self, "strength", plain)
        if not self.strengths or not all(map(math.isfinite, self.strengths)):
            raise ConfigError(f"The strength is {self.strength}. It must be a finite number, or one for each prompt.")
        if self.unit not in UNITS:
            raise ConfigError(f"unit={self.unit!r} was given. Give one of {', '.join(map(repr, UNITS))}.")
        if self.unit == "scale" and self.subspace.scale_unit != ACTIVATION:
            raise ConfigError(
                f"The subspace's steps are in units of {self.subspace.scale_unit}, so a strength would mean nothing. "
                "Give it steps in activation units: subspace.with_scale([...]). Or use unit='norm' or unit='raw'."
            )
        if self.unit != "scale" and not bool(self.subspace.scale.any()):
            raise ConfigError("The subspace's steps are all zero, so they give no direction. Use with_scale([...]).")
        if self.site is None and self.subspace.site is None:
            raise SiteError("The subspace does not say where it was found. Pass site=Site(layer).")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength of each prompt of the call; one number where all have the same."""
        return (float(self.strength),) if isinstance(self.strength, int | float) else tuple(map(float, self.strength))

    @property
    def size(self) -> float:
        """The largest strength of any prompt, without its sign."""
        return max(map(abs, self.strengths))

    def edits(self, n_layers: int) -> EditMap:
        """One edit, at one site."""
        site = self.site or self.subspace.site
        if site is None:  # __post_init__ has checked; for the type checker
            return {}
        step = (self.subspace.scale[:, None] * self.subspace.basis).sum(0)
        if self.unit != "scale":
            step = step / step.norm()

        def change(x: Tensor, prompt: Tensor) -> Tensor:
            amount = self._strength(prompt)
            wide = x.to(torch.promote_types(x.dtype, step.dtype))  # rounded once, at the end
            norm = wide.norm(dim=-1, keepdim=True) if self.unit == "norm" or self.keep_norm else None
            if self.unit == "norm" and norm is not None:
                amount = amount * norm
            moved = wide + amount * step.to(wide)
            if self.keep_norm and norm is not None:
                moved = moved * (norm / moved.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny))
            return moved

        return {site.resolve(n_layers): ruled(self.where, change, self.when, n_layers)}

    def _strength(self, prompt: Int[Tensor, " n"]) -> float | Float[Tensor, "n 1"]:
        if isinstance(self.strength, int | float):
            return self.strength
        return of_prompts(torch.tensor(self.strengths), prompt, "strengths")[:, None]

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """The direction, at its site; and what the rule is made of."""
        own: list[tuple[Site, Part]] = [(site, self.subspace) for site in self.edits(n_layers)]
        return own if self.when is None else [*own, *self.when.parts(n_layers)]

    def with_subspace(self, subspace: Subspace) -> "Steer":
        """The same operation along another subspace, at the same place and by the same rule."""
        return replace(self, subspace=subspace, site=self.site or self.subspace.site)

    def with_strength(self, strength: float | Sequence[float] | Float[Tensor, " n"]) -> "Steer":
        """The same operation at another strength."""
        return replace(self, strength=strength)

    def scaled(self, factor: float) -> "Steer":
        """The same operation at a multiple of its strength, of every prompt."""
        if isinstance(self.strength, int | float):
            return self.with_strength(factor * self.strength)
        return self.with_strength(tuple(factor * strength for strength in self.strengths))

    def __repr__(self) -> str:
        site = self.site or self.subspace.site
        many = f"{min(self.strengths):+g} to {max(self.strengths):+g} by prompt"
        amount = f"{self.strength:+g}" if isinstance(self.strength, int | float) else many
        amount += "" if self.unit == "scale" else f" {UNITS[self.unit]}"
        more = (", norm kept" if self.keep_norm else "") + (f", when {self.when!r}" if self.when else "")
        return f"Steer({amount} at {site.short if site else '?'}, {self.where}{more})"


def of_prompts(values: Float[Tensor, "m ..."], prompt: Int[Tensor, " n"], name: str) -> Float[Tensor, "n ..."]:
    """The row of each token's prompt.

    Args:
        values: one row for each prompt of the call.
        prompt: which prompt each token belongs to.
        name: what the values are, for the error.

    Raises:
        DataError: more prompts in the call than there are rows.
    """
    if prompt.numel() and int(prompt.max()) >= len(values):
        raise DataError(
            f"There are {name} for {len(values)} prompts, but the call has a prompt number {int(prompt.max())}, "
            "counted from 0. Give one for each prompt of the call, in their order."
        )
    return values.to(prompt.device)[prompt]
