"""The knob: set a state's coordinate along a direction to a stated value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.edits import EditMap
from subspace_probe.core.errors import ConfigError, ShapeError, SiteError, unknown
from subspace_probe.core.protocols import Part
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import ALL, Where
from subspace_probe.interventions.rules import Rule, ruled
from subspace_probe.interventions.steer import of_prompts

Value = float | Sequence[float] | Float[Tensor, "..."]
"""Of the coordinates: shape [k] for all prompts or [n, k] for each of them; for a direction a number, or [n]."""


@final
@dataclass(frozen=True, eq=False)
class KnobClamp:
    """Set a coordinate, or several, to a value: h + (c - u . h) u (Minder et al. 2024, arXiv:2411.07404).

    What lies outside of the subspace stays as it is, and clamping twice is clamping once. The coordinate is counted
    from zero, as published, not from the subspace's origin: `subspace.coords` of an origin o gives c - u . o. A
    subspace with a reader of its own is read by it and written along its basis. The sign of a direction and of its
    value turn together, `KnobClamp(-direction, -c)`; so do "at_least" and "at_most".

    The published edit acts on the last position of every forward call with a cache, which is
    `where=after(LAST.offset(-1))`: the last prompt token, and each generated one.

    Args:
        subspace: the knob.
        value: c; one number for a direction, k for k rows. For each prompt of the call its own: [n], or [n, k].
        site: where to set it; default is where it was found.
        where: of which tokens.
        bound: "exactly" sets it; "at_least" and "at_most" only move coordinates that are below or above.
        values: a value for each intent, to choose from with `.to("context")`.
        when: of these tokens, only those that the rule allows.
    """

    subspace: Subspace
    value: Value | None = None
    site: Site | None = None
    where: Where = ALL
    bound: Literal["exactly", "at_least", "at_most"] = "exactly"
    values: Mapping[str, Value] = field(default_factory=dict[str, Value])
    when: Rule | None = None

    def __post_init__(self) -> None:
        if self.value is None and not self.values:
            raise ConfigError("A clamp without a value was asked for. Give value=, or values= by intent.")
        for value in (*([] if self.value is None else [self.value]), *self.values.values()):
            _rows(value, self.subspace.rank)
        if self.bound not in ("exactly", "at_least", "at_most"):
            raise ConfigError(f"bound={self.bound!r} was given. Give 'exactly', 'at_least' or 'at_most'.")
        if self.site is None and self.subspace.site is None:
            raise SiteError("The subspace does not say where it was found. Pass site=Site(layer).")

    def to(self, intent: str) -> "KnobClamp":
        """The same clamp at the value of an intent.

        Raises:
            UnknownName: no value for it.
        """
        if intent not in self.values:
            raise unknown("intent", intent, self.values)
        return replace(self, value=self.values[intent])

    def edits(self, n_layers: int) -> EditMap:
        """One edit, at one site.

        Raises:
            ConfigError: no intent was chosen.
        """
        site = self.site or self.subspace.site
        if site is None:  # __post_init__ has checked; for the type checker
            return {}
        if self.value is None:
            raise ConfigError(f"No value was chosen. Choose an intent: clamp.to({next(iter(self.values))!r}).")
        targets, by_prompt = _rows(self.value, self.subspace.rank)

        def change(x: Tensor, prompt: Tensor) -> Tensor:
            wide = x.to(torch.promote_types(x.dtype, self.subspace.basis.dtype))  # rounded once, at the end
            wanted = of_prompts(targets, prompt, "values") if by_prompt else targets
            missing = wanted.to(wide) - wide @ self.subspace.readers.to(wide).T
            if self.bound == "at_least":
                missing = missing.clamp(min=0)
            elif self.bound == "at_most":
                missing = missing.clamp(max=0)
            return wide + missing @ self.subspace.basis.to(wide)

        return {site.resolve(n_layers): ruled(self.where, change, self.when, n_layers)}

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """The subspace, at its site; and what the rule is made of."""
        site = self.site or self.subspace.site
        own: list[tuple[Site, Part]] = [] if site is None else [(site.resolve(n_layers), self.subspace)]
        return own if self.when is None else [*own, *self.when.parts(n_layers)]

    def with_subspace(self, subspace: Subspace) -> "KnobClamp":
        """The same values along another subspace, at the same place and by the same rule."""
        return replace(self, subspace=subspace, site=self.site or self.subspace.site)

    def __repr__(self) -> str:
        site = self.site or self.subspace.site
        chosen = "unset" if self.value is None else f"{self.bound.replace('_', ' ')} {_said(self.value)}"
        more = f", when {self.when!r}" if self.when else ""
        return f"KnobClamp({chosen} at {site.short if site else '?'}, {self.where}{more})"


def _rows(value: Value, rank: int) -> tuple[Float[Tensor, "n k"], bool]:
    """The value as rows of coordinates, and whether there is one for each prompt of the call.

    Raises:
        ShapeError: another number of coordinates, or values that are not finite.
    """
    given = torch.as_tensor(value, dtype=torch.float32)
    by_prompt = given.ndim == (1 if rank == 1 and given.ndim < 2 else 2)
    rows = given.reshape(-1, 1) if rank == 1 and given.ndim < 2 else given[None] if given.ndim == 1 else given
    if rows.ndim != 2 or rows.shape[1] != rank or not len(rows):
        wanted = "a number, or one for each prompt" if rank == 1 else f"[{rank}], or [n, {rank}] with one row a prompt"
        raise ShapeError(
            f"A value of shape {tuple(given.shape)} was given for a subspace of rank {rank}. Give {wanted}."
        )
    if not bool(rows.isfinite().all()):
        raise ShapeError("A value that is not finite was given for a coordinate. Give finite numbers.")
    return rows, by_prompt


def _said(value: Value) -> str:
    return f"{value:+g}" if isinstance(value, int | float) else f"{tuple(torch.as_tensor(value).shape)} values"
