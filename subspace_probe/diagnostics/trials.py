"""One intervention on one behaviour, with the same thing done along random and along label-permuted directions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Expectation, Finding, Interval, judge_absence
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.protocols import Intervention, Metric
from subspace_probe.diagnostics.auditing import Examination
from subspace_probe.diagnostics.cases import subspace_of
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.models.hooked import HookedModel

MARGIN = 0.1
"""Half-width of "no effect" on a rate: stated beforehand, the same everywhere."""


@final
@dataclass(frozen=True, eq=False)
class Trial:
    """Scores of a behaviour, above 0 where it is shown.

    Attributes:
        clean, edited: without and with the intervention, shape [n].
        random: along random directions of the same length, shape [draws, n].
        permuted: along directions from permuted labels, with their own length, shape [draws, n].
    """

    contrast: Contrast
    clean: Float[Tensor, " n"]
    edited: Float[Tensor, " n"]
    random: Float[Tensor, "draws n"]
    permuted: Float[Tensor, "permuted n"]
    seed: int = 0

    @property
    def null(self) -> Interval:
        """The rate under random directions of equal norm, and under directions from shuffled labels where those ran."""
        null = range_of((self.random > 0).double().mean(1), f"{len(self.random)} random directions of equal norm")
        if not len(self.permuted):
            return null
        shuffled = range_of((self.permuted > 0).double().mean(1), "")
        of = f"{null.of}, and {len(self.permuted)} directions from shuffled labels"
        return Interval(min(null.low, shuffled.low), max(null.high, shuffled.high), of=of)

    def rate(
        self,
        name: str,
        claim: str,
        *,
        wanted: str = "above",
        least: float = 0.0,
        most: float = 1.0,
        expected: Expectation | None = None,
    ) -> Finding:
        """Share of prompts that show the behaviour under the intervention.

        Args:
            wanted: "above" or "below" the nulls for a claimed effect, "same" for a claimed absence.
            least, most: rates without intervention between which the claim can be tested at all; outside, the verdict
                is "not tested": a behaviour that is never shown cannot be shown to stay.
        """
        estimate, interval = mean_of((self.edited > 0).double(), self.contrast.groups, seed=self.seed)
        base = float((self.clean > 0).double().mean())
        note = (
            f"{base:.3f} without intervention, {float((self.random > 0).double().mean()):.3f} along random directions"
        )
        if len(self.permuted):
            shuffled = range_of((self.permuted > 0).double().mean(1), "")
            note += f", {shuffled.low:.3f} to {shuffled.high:.3f} along directions from shuffled labels"
        finding = Finding(name, claim, estimate, interval, self.null, len(self.contrast), expected=expected, note=note)
        if not least <= base <= most:
            reason = f"{note}; the claim needs a rate from {least:g} to {most:g} without intervention"
            return replace(finding, verdict="not tested", note=reason)
        if wanted == "same":
            return replace(finding, verdict=judge_absence(interval, margin=MARGIN, no_effect=base))
        return finding.judged("above" if wanted == "above" else "below", margin=MARGIN, no_effect=base)

    def random_rate(self, name: str, claim: str, *, expected: Expectation | None = None) -> Finding:
        """Mean share over random directions; the interval is the range over the draws."""
        rates = (self.random > 0).double().mean(1)
        base = float((self.clean > 0).double().mean())
        spread = range_of(rates, f"{len(rates)} random directions of equal norm")
        high = float(rates.quantile(0.95))
        note = f"mean over {len(rates)} directions; 95th percentile {high:.3f}; {base:.3f} without intervention"
        verdict = judge_absence(spread, margin=MARGIN, no_effect=base)
        null = Interval(base, base, of="no intervention")
        mean = float(rates.mean())
        return Finding(name, claim, mean, spread, null, len(self.contrast), verdict, expected=expected, note=note)

    def wrong_way(self, name: str, claim: str, *, up: bool = True) -> Finding:
        """Share of prompts whose score the intervention moves against its aim."""
        sign = 1.0 if up else -1.0
        against = (sign * (self.edited - self.clean) < 0).double()
        null = range_of(
            (sign * (self.random - self.clean) < 0).double().mean(1), f"{len(self.random)} random directions"
        )
        estimate, interval = mean_of(against, self.contrast.groups, seed=self.seed)
        finding = Finding(name, claim, estimate, interval, null, len(self.contrast))
        return replace(finding, verdict=judge_absence(interval, margin=MARGIN))

    def draws(self, direction: str, behaviour: str) -> list[dict[str, object]]:
        """Rows of the null figure."""
        kinds = {"random direction": self.random, "permuted labels": self.permuted, "observed": self.edited[None]}
        return [
            {"direction": direction, "behaviour": behaviour, "kind": kind, "value": rate}
            for kind, scores in kinds.items()
            for rate in (scores > 0).double().mean(1).tolist()
        ]


def trial_of(examination: Examination) -> Trial:
    """The trial that an audit has already run."""
    case, values = examination.case, examination.values
    none = torch.empty(0, len(case.contrast), dtype=torch.float64)
    random, permuted = (values.get(name, none) for name in ("random", "permutation"))
    return Trial(case.contrast, case.clean, case.edited, random, permuted, case.seed)


def trial(
    model: HookedModel,
    contrast: Contrast,
    intervention: Intervention,
    metric: Metric,
    *,
    draws: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Trial:
    """Run one intervention with random directions only.

    Args:
        draws: how many.
    """
    randoms = [random_like(subspace_of(intervention), seed=s) for s in range(seed, seed + draws)]
    conditions: list[Condition] = [None, intervention, *map(intervention.with_subspace, randoms)]
    scores = outcomes(model, contrast.prompts, conditions, [metric], progress=progress, name="random directions")[0]
    none = torch.empty(0, len(contrast), dtype=torch.float64)
    return Trial(contrast, scores[0], scores[1], scores[2:], none, seed)


def steering_choice(
    model: HookedModel,
    contrast: Contrast,
    candidates: Sequence[Sequence[Intervention]],
    metric: Metric,
    *,
    enough: float = 0.95,
) -> tuple[Intervention, Float[Tensor, "site strength"]]:
    """The site and strength that move a behaviour most on validation prompts.

    The smallest strength that reaches a rate of `enough` is taken, at the site where it moves the score most; where
    none does, the site and strength with the highest rate.

    Args:
        candidates: one list a site, strengths ascending.

    Returns:
        the choice, and all rates, shape [site, strength].
    """
    flat = [intervention for site in candidates for intervention in site]
    scores = outcomes(model, contrast.prompts, [None, *flat], [metric])[0]
    shape = (len(candidates), len(candidates[0]))
    rates = (scores[1:] > 0).double().mean(1).reshape(shape)
    moves = (scores[1:] - scores[0]).mean(1).reshape(shape)
    reached = (rates >= enough).any(0).nonzero().flatten()
    if len(reached):
        strength = int(reached[0])
        allowed = torch.where(rates[:, strength] >= enough, moves[:, strength], -torch.inf)
        site = int(allowed.argmax())
    else:
        best = (rates + 1e-6 * moves.tanh()).flatten().argmax()
        site, strength = divmod(int(best), shape[1])
    return candidates[site][strength], rates
