"""What else does it change?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.protocols import Metric
from subspace_probe.diagnostics.budgets import reruns
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.interventions.conditions import Condition, condition_logits, outcomes
from subspace_probe.metrics.answers import Accuracy
from subspace_probe.metrics.behaviour import DivergenceFrom

NEGLIGIBLE = 0.01
"""Mean KL in nats below which a change is no change, whatever random directions do."""
PUBLISHED_KL = 0.1
"""Mean KL in nats above which a direction is refused whatever random directions do (Arditi et al. 2024)."""


@final
@dataclass(frozen=True)
class Specificity(CaseCheck):
    """Harm done elsewhere, on prompts that have nothing to do with the behaviour.

    KL from clean to edited next-token distributions (nats), with random directions of the same length as reference, and
    where the prompts carry answers the change in accuracy, judged against a margin of three points.
    """

    name: ClassVar[str] = "specificity"
    question: ClassVar[str] = "Does it leave other behaviour alone?"

    draws: int = 40
    margin: float = 0.03

    def missing(self, case: Case) -> str:
        """Needs neutral prompts."""
        return case.whole if case.neutral is not None else "audit was given no neutral prompts (neutral=...)."

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Runs on its own prompts."""
        return []

    def passes(self, case: Case) -> float:
        """Its own prompts, under every condition; what lies below the edits is computed once for all."""
        if case.neutral is None:
            return 0.0
        batch = case.model.tokens(case.neutral.prompts)
        return batch.size * (1.0 + (self.draws + 1) * reruns(case, batch, [case.intervention]))

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """KL and accuracy on the neutral prompts."""
        if case.neutral is None:
            return []
        seeds = range(case.seed + 2000, case.seed + 2000 + self.draws)
        randoms = [case.intervention.with_subspace(random_like(case.subspace, seed=seed)) for seed in seeds]
        prompts, groups = case.neutral.prompts, case.neutral.groups
        clean = condition_logits(case.model, prompts, [None])[0]
        answers = all(prompt.answer for prompt in prompts)
        metrics: list[Metric] = [DivergenceFrom(prompts, clean), *([Accuracy(case.model)] if answers else [])]
        moved, *scored = outcomes(case.model, prompts, [case.intervention, *randoms], metrics)
        estimate, interval = mean_of(moved[0], groups, seed=case.seed)
        null = range_of(moved[1:].mean(1), f"{self.draws} random directions")
        note = f"mean KL on other prompts {estimate:.3g} nats; random directions {null.low:.3g} to {null.high:.3g}"
        claim = "other behaviour changes by less than a hundredth of a nat, or no more than under random directions"
        small = interval.high <= NEGLIGIBLE
        harmless = interval.high <= min(null.high, PUBLISHED_KL)
        refuted = interval.low > max(null.high, NEGLIGIBLE)
        verdict = "supported" if small or harmless else "refuted" if refuted else "inconclusive"
        found = [Finding("control.specificity.kl", claim, estimate, interval, null, len(prompts), verdict, note=note)]
        for edited in scored:
            right = torch.cat([Accuracy(case.model)(clean, prompts)[None], edited])
            # what is lost, not what is gained: where nothing changes, the interval is Wilson's, on the side of loss
            lost, around = mean_of(right[0] - right[1], groups, seed=case.seed)
            change, spread = 0.0 - lost, replace(around, low=0.0 - around.high, high=0.0 - around.low)
            drawn = range_of((right[2:] - right[0]).mean(1), f"{self.draws} random directions")
            kept = (
                "supported"
                if spread.low >= -self.margin
                else "refuted"
                if spread.high < -self.margin
                else "inconclusive"
            )
            note = f"accuracy on other skills {float(right[0].mean()):.3f} before, {float(right[1].mean()):.3f} after"
            claim = "accuracy on other skills falls by less than three points"
            found.append(
                Finding("control.specificity.accuracy", claim, change, spread, drawn, len(prompts), kept, note=note)
            )
        return found
