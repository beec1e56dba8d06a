"""One intervention, and the same at other layers, at other tokens and at other strengths: all in shared passes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import PositionError
from subspace_probe.core.protocols import Intervention
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST, PROMPT, T_INST, T_POST_INST, TokenBatch, Where
from subspace_probe.diagnostics.cases import Case, place_of, with_natural
from subspace_probe.diagnostics.firing import Fired, fire
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.interventions.ablate import Ablate
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.interventions.steer import Steer
from subspace_probe.models.hooked import HookedModel

DRAWS, FEWER = 40, 16
"""Random directions at the strength asked about, and at larger ones."""
LAYERS, PAIRS = 12, 32
"""At most so many layers are tried, and so many natural pairs."""
FACTORS = (1.0, 2.0, 4.0)
WORKS, NOTHING = 0.25, 0.1
"""Shares of the difference between the classes: from here on something works; up to here it does nothing."""


@final
@dataclass(frozen=True, eq=False)
class Look:
    """What was measured.

    Attributes:
        case: with the metric of each prompt, clean and edited.
        fired: what each site's edit did.
        site: the site asked about: where the subspace was found, or the first that is edited.
        tried: the metric under each variant, shape [draws, n], by its kind and what was varied; the kind "random" holds
            many draws at the strength named, all others one.
        exchanged: the metric of the natural prompts, shape [m], under "whole", "subspace" and "stranger" exchanges.
    """

    case: Case
    fired: Mapping[Site, Fired]
    site: Site
    tried: Mapping[tuple[str, str], Tensor]
    exchanged: Mapping[str, Tensor]

    @property
    def here(self) -> Fired:
        """What was done at the site asked about."""
        return self.fired[self.site]

    @cached_property
    def unit(self) -> float:
        """The size of a full effect: the distance of the classes in the metric, or twice its standard deviation."""
        if self.case.natural is not None and self.case.natural.gap:
            return abs(self.case.natural.gap)
        labels, clean = torch.tensor(self.case.contrast.labels), self.case.clean
        if len(labels.unique()) == 2:
            return abs(float(clean[labels == 1].mean() - clean[labels == 0].mean()))
        return 2 * float(clean.std()) if len(clean) > 1 else 1.0

    def effect(self, kind: str, what: str) -> float:
        """Mean effect of a variant, in units of a full one."""
        return float((self.tried[kind, what] - self.case.clean).mean()) / self.unit

    def variants(self, kind: str) -> dict[str, float]:
        """The mean effects of all variants of one kind."""
        return {what: self.effect(kind, what) for own, what in self.tried if own == kind}

    def random(self, what: str) -> Float[Tensor, " draws"]:
        """Mean effects of random directions at a strength, in units of a full effect; none for whole states."""
        found = self.tried.get(("random", what))
        return torch.zeros(0) if found is None else (found - self.case.clean).mean(1) / self.unit

    @cached_property
    def direction(self) -> Float[Tensor, " d"] | None:
        """The unit direction of the move: of the subspace where it has rank one, else that of the mean move."""
        subspace = self.case.intervention.subspace
        if subspace is not None and subspace.rank == 1:
            return subspace.unit.float().cpu()
        mean = self.here.change.mean(0)
        return mean / mean.norm() if float(mean.norm()) else None

    @cached_property
    def class_gap(self) -> float:
        """Distance of the class means along the direction, of the natural pairs; NaN without."""
        if self.direction is None or self.case.natural is None:
            return math.nan
        along, labels = self.case.natural.base @ self.direction, self.case.natural.row_labels
        return abs(float(along[labels == 1].mean() - along[labels == 0].mean()))

    @property
    def used(self) -> float | None:
        """Share of the partners' difference that exchanging the subspace moves; None where that was not run."""
        if self.case.natural is None or "subspace" not in self.exchanged:
            return None
        return float(self.case.natural.shares(self.exchanged["subspace"]).mean())

    @cached_property
    def step(self) -> float:
        """Median length of the moves along the direction; of the moves themselves where they have none in common."""
        moved = self.here.change[self.here.moved]
        if not len(moved):
            return 0.0
        along = moved.norm(dim=1) if self.direction is None else (moved @ self.direction).abs()
        return float(along.median())


def looked(case: Case, contrast: Contrast, *, progress: bool) -> Look:
    """Measure everything that is run on the metric.

    Args:
        contrast: natural pairs, where it has any.
    """
    case = with_natural(case, contrast, _place, PAIRS)
    fired = fire(case.model, case.intervention, case.contrast.prompts)
    site = case.natural.site if case.natural is not None else next(iter(fired))
    look = Look(case, fired, site if site in fired else next(iter(fired)), {}, {})
    named = _variants(look)
    conditions = [None, case.intervention, *(condition for *_, condition in named)]
    values = outcomes(
        case.model, case.contrast.prompts, conditions, [case.metric], progress=progress, name="explain_no_effect"
    )[0]
    tried: dict[tuple[str, str], list[Tensor]] = {}
    for (kind, what, _), own in zip(named, values[2:], strict=True):
        tried.setdefault((kind, what), []).append(own)
    return replace(
        look,
        case=replace(case, clean=values[0], edited=values[1]),
        tried={key: torch.stack(found) for key, found in tried.items()},
        exchanged=_exchanged(case, progress),
    )


def _variants(look: Look) -> list[tuple[str, str, Condition]]:
    """The same at other layers, at other tokens and at larger strengths; and random directions beside."""
    case, found = look.case, list[tuple[str, str, Condition]]()
    found += [("random", "x1", other) for other in _random(case, case.intervention, DRAWS)]
    found += [("layers", site.short, other) for site, other in _at_layers(look)]
    found += [("tokens", str(where), other) for where, other in _at_tokens(case)]
    if isinstance(case.intervention, Steer):
        for factor in (*FACTORS[1:], *_matching(look)):
            scaled, what = case.intervention.scaled(factor), f"x{factor:g}"
            found.append(("strength", what, scaled))
            found += [("random", what, other) for other in _random(case, scaled, FEWER)]
    return found


def _random(case: Case, intervention: Intervention, draws: int) -> list[Intervention]:
    if case.whole:
        return []
    seeds = range(case.seed, case.seed + draws)
    return [intervention.with_subspace(random_like(case.subspace, seed=seed)) for seed in seeds]


def _at_layers(look: Look) -> list[tuple[Site, Intervention]]:
    """At the same tokens of other layers; of interventions that act at one site, and without a rule."""
    case, site = look.case, look.site
    if len(look.fired) > 1 or _ruled(case.intervention):
        return []
    n_layers = case.model.spec.n_layers
    count = min(LAYERS, n_layers)
    layers = sorted({round(i * (n_layers - 1) / max(1, count - 1)) for i in range(count)} - {site.layer})
    sites = [replace(site, layer=layer) for layer in layers]
    if isinstance(case.intervention, Steer):
        return [(other, replace(case.intervention, site=other)) for other in sites]
    if isinstance(case.intervention, Ablate) and case.intervention.to is None:
        return [(other, replace(case.intervention, sites=other)) for other in sites]
    return []


def _at_tokens(case: Case) -> list[tuple[Where, Intervention]]:
    """At the same layers, other tokens."""
    if _ruled(case.intervention):
        return []
    batch = case.model.tokens(case.contrast.prompts)
    found: list[tuple[Where, Intervention]] = []
    for where in (T_INST, T_POST_INST, LAST, PROMPT):
        other: Intervention | None = None
        if isinstance(case.intervention, Steer) or (
            isinstance(case.intervention, Ablate) and case.intervention.to is None
        ):
            other = replace(case.intervention, where=where)
        try:
            if other is not None and _selected(batch, where) != _selected(batch, case.intervention.where):
                found.append((where, other))
        except PositionError:  # prompts without such a token
            continue
    return found


def _selected(batch: TokenBatch, where: Where) -> list[list[bool]]:
    return (batch.select(where, batch.positions) & batch.mask).tolist()


def _ruled(intervention: Intervention) -> bool:
    return isinstance(intervention, Steer) and intervention.when is not None


def _matching(look: Look) -> list[float]:
    """The factor that would move states as far as the classes lie apart, where that is beyond those tried."""
    if not look.step or not math.isfinite(look.class_gap):
        return []
    wanted = float(f"{look.class_gap / look.step:.2g}")
    # where the classes hardly differ along the direction there is nothing to match, and a longer one leaves no state
    return [wanted] if FACTORS[-1] < wanted <= 1 / max(look.here.relative, 1e-6) else []


def _exchanged(case: Case, progress: bool) -> dict[str, Tensor]:
    """Exchanges between the partners of natural pairs, and within the classes, at the site asked about."""
    if case.natural is None:
        return {}
    pairs = case.natural
    named: dict[str, Condition] = {"whole": pairs.moved(pairs.difference)}
    if not case.whole:
        named["subspace"] = pairs.moved(pairs.within(case.subspace))
        half = len(pairs) // 2
        if len(pairs.base) == len(pairs):
            order = torch.arange(len(pairs))
            stranger = torch.cat([order[:half].roll(1), order[half:].roll(1)])
            inside = case.subspace.project(pairs.base.double())
            named["stranger"] = pairs.moved((inside[stranger] - inside).float())
    values = outcomes(
        case.model, pairs.prompts.prompts, list(named.values()), [case.metric], progress=progress, name="exchanges"
    )[0]
    return dict(zip(named, values, strict=True))


def _place(model: HookedModel, intervention: Intervention) -> tuple[Site, Where]:
    """Where the subspace is claimed to act; of whole states, the first site that is edited."""
    if intervention.subspace is not None:
        return place_of(model, intervention)
    sites = intervention.edits(model.spec.n_layers)
    return min(sites, key=lambda site: site.order), intervention.where
