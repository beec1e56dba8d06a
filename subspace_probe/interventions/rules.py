"""Conditions: which tokens an intervention acts on, decided from the states of the very pass it edits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspace_probe.core.edits import NOTHING, At, EditContext, Needs
from subspace_probe.core.errors import ConfigError, PositionError, RankError, SiteError
from subspace_probe.core.protocols import Part
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.interventions.targets import HalfSpace


@runtime_checkable
class Rule(Protocol):
    """What `Steer(..., when=rule)` takes. A frozen dataclass, so that it can be saved with its intervention."""

    def __call__(self, ctx: EditContext) -> Bool[Tensor, "batch pos"]:
        """Which tokens of the pass it allows to be edited."""
        ...

    def needs(self, where: Where) -> Needs:
        """The sites it reads, and the tokens it reads there, if the tokens `where` are to be edited."""
        ...

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """What it was made from, and where that is used; checked against the model before anything runs."""
        ...

    def resolve(self, n_layers: int) -> "Rule":
        """The same with layers counted from the front."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Score:
    """Where a probe's score is at least a threshold ("above"), or less than it ("below").

    With `where`, one token of the prompt decides for all tokens of that prompt, generated ones included (conditional
    steering, Lee et al. 2024, arXiv:2409.05907): the decision is taken in the pass that sees the prompt, once for each
    intervention, and remembered while decoding. Without it every token is judged by its own state.

    The states are those of the pass being edited: what lower sites' edits did to them is seen. At the edited site
    itself, they are as they were before any edit there. Gradients do not flow through a decision.

    Args:
        probe: a direction, whose score is its coordinate about its origin (the threshold of a linear probe, the
            midpoint of the classes of a mean difference), or a half-space.
        threshold: default 0 for a direction, the margin for a half-space.
        side: "above" or "below".
        site: where the states are read, no later than the edited site; default is where the probe was found.
        where: the one token that decides for its prompt, such as T_INST; None for each token by itself.
    """

    probe: Subspace | HalfSpace
    threshold: float | None = None
    side: Literal["above", "below"] = "above"
    site: Site | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        if isinstance(self.probe, Subspace) and self.probe.rank != 1:
            raise RankError(
                f"A score has one direction, but the probe has rank {self.probe.rank}. Choose one of its rows."
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"The threshold is {self.threshold}. It must be a finite number.")
        if self.side not in ("above", "below"):
            raise ConfigError(f"side={self.side!r} was given. Give 'above' or 'below'.")
        if self.where is not None and not self.where.single:
            raise PositionError(
                f"{str(self.where)!r} is not one token, so it cannot decide for its prompt. Give one, such as T_INST "
                "or LAST, or leave it out to judge every token by its own state."
            )
        if self.site is None and self.probe.site is None:
            raise SiteError("The probe does not say where it was found. Pass site=Site(layer).")

    def __call__(self, ctx: EditContext) -> Bool[Tensor, "batch pos"]:
        """Which tokens of this pass it holds for.

        Raises:
            SiteError: the pass does not read the site.
            PositionError: the deciding token was in no pass so far.
        """
        if self.where is None:
            return self._holds(self._states(ctx)).to(ctx.positions.device)
        if self not in ctx.memory:
            ctx.memory[self] = self._decision(ctx, self.where)
        return ctx.memory[self].to(ctx.positions.device)[:, None].expand(ctx.positions.shape)

    def needs(self, where: Where) -> Needs:
        """Its site, at the token that decides; at the edited tokens where each is judged by itself."""
        return frozenset({(self._site, self.where or where)})

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """The probe, at the site it is read at."""
        return [(self._site.resolve(n_layers), self.probe)]

    def resolve(self, n_layers: int) -> "Score":
        """The same with layers counted from the front; another object, whose decisions are its own."""
        return replace(self, site=self._site.resolve(n_layers))

    @property
    def _site(self) -> Site:
        site = self.site or self.probe.site
        if site is None:  # __post_init__ has checked; for the type checker
            raise SiteError("The probe does not say where it was found.")
        return site

    def _states(self, ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        if self._site not in ctx.reads:
            raise SiteError(
                f"A rule reads {self._site.short}, but this pass shows {[site.short for site in ctx.reads]}. Run it as "
                "part of an intervention: Steer(..., when=rule)."
            )
        return ctx.reads[self._site]

    def _decision(self, ctx: EditContext, where: Where) -> Bool[Tensor, " batch"]:
        chosen = ctx.select(where)
        if not bool((chosen.sum(-1) == 1).all()):
            row = int((chosen.sum(-1) != 1).nonzero()[0, 0])
            raise PositionError(
                f"The token {str(where)!r} decides whether prompt {int(ctx.batch.index[row])} is edited, but this pass "
                "does not run it. Begin the pass at or before it."
            )
        states = self._states(ctx)
        return self._holds(states[chosen.to(states.device)])

    @property
    def _least(self) -> float:
        own = self.probe.margin if isinstance(self.probe, HalfSpace) else 0.0
        return own if self.threshold is None else self.threshold

    def _holds(self, x: Float[Tensor, "*b d"]) -> Bool[Tensor, "*b"]:
        half = self.probe if isinstance(self.probe, HalfSpace) else HalfSpace.of(self.probe)
        above = half.score(x) >= self._least
        return above if self.side == "above" else ~above

    def __repr__(self) -> str:
        asked = f"score {'>=' if self.side == 'above' else '<'} {self._least:g}"
        return f"Score({asked} at {self._site.short}, {'each token' if self.where is None else self.where})"


@final
@dataclass(frozen=True, eq=False)
class AllOf:
    """Where every one of several rules holds."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        _require_some(self.rules)

    def __call__(self, ctx: EditContext) -> Bool[Tensor, "batch pos"]:
        """All are asked, so that each takes its decision in the pass that sees its token."""
        return torch.stack([rule(ctx) for rule in self.rules]).all(0)

    def needs(self, where: Where) -> Needs:
        """What any of them reads."""
        return NOTHING.union(*(rule.needs(where) for rule in self.rules))

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """Those of all of them."""
        return [part for rule in self.rules for part in rule.parts(n_layers)]

    def resolve(self, n_layers: int) -> "AllOf":
        """The same with layers counted from the front."""
        return replace(self, rules=tuple(rule.resolve(n_layers) for rule in self.rules))


@final
@dataclass(frozen=True, eq=False)
class AnyOf:
    """Where at least one of several rules holds."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        _require_some(self.rules)

    def __call__(self, ctx: EditContext) -> Bool[Tensor, "batch pos"]:
        """All are asked, so that each takes its decision in the pass that sees its token."""
        return torch.stack([rule(ctx) for rule in self.rules]).any(0)

    def needs(self, where: Where) -> Needs:
        """What any of them reads."""
        return NOTHING.union(*(rule.needs(where) for rule in self.rules))

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """Those of all of them."""
        return [part for rule in self.rules for part in rule.parts(n_layers)]

    def resolve(self, n_layers: int) -> "AnyOf":
        """The same with layers counted from the front."""
        return replace(self, rules=tuple(rule.resolve(n_layers) for rule in self.rules))


@final
@dataclass(frozen=True, eq=False)
class Not:
    """Where a rule does not hold."""

    rule: Rule

    def __call__(self, ctx: EditContext) -> Bool[Tensor, "batch pos"]:
        """The rule, turned round."""
        return ~self.rule(ctx)

    def needs(self, where: Where) -> Needs:
        """What the rule reads."""
        return self.rule.needs(where)

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """The rule's."""
        return self.rule.parts(n_layers)

    def resolve(self, n_layers: int) -> "Not":
        """The same with layers counted from the front."""
        return replace(self, rule=self.rule.resolve(n_layers))


def ruled(
    where: Where,
    change: Callable[[Float[Tensor, "n d"], Int[Tensor, " n"]], Float[Tensor, "n d"]],
    when: Rule | None,
    n_layers: int,
) -> At:
    """The edit that changes the tokens `where`, of them only those that a rule allows."""
    if when is None:
        return At(where, change)
    rule = when.resolve(n_layers)
    return At(where, change, rule, rule.needs(where))


def _require_some(rules: tuple[Rule, ...]) -> None:
    if not rules:
        raise ConfigError("No rules were given. Give at least one, or leave when= out.")
