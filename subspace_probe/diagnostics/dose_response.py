"""Does more of it do more?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.interventions.conditions import Condition
from subspace_probe.interventions.steer import Steer


@final
@dataclass(frozen=True)
class DoseResponse(CaseCheck):
    """The effect of a small dose, and whether the effect grows with the dose up to the full one.

    Estimate: the mean effect at half the strength. Null: the same for random directions. Supported where it goes the
    way of the full dose, is no larger, and all steps between doses but one go that way too. Applies to steering. An
    effect that appears only at large doses is a push off the data rather than a use of the direction.
    """

    name: ClassVar[str] = "dose"
    question: ClassVar[str] = "Does a smaller dose have a smaller effect of the same kind?"

    doses: tuple[float, ...] = (-1.0, -0.5, 0.25, 0.5, 0.75, 1.0)
    draws: int = 40

    def missing(self, case: Case) -> str:
        """Steering only: other interventions have no strength."""
        return "" if isinstance(case.intervention, Steer) else "only steering has a dose."

    def conditions(self, case: Case) -> Sequence[Condition]:
        """One condition a dose, then random directions at half the strength."""
        if not isinstance(case.intervention, Steer):
            return []
        steer = case.intervention
        dosed: list[Condition] = [steer.scaled(dose) for dose in self.doses]
        half = steer.scaled(0.5)
        seeds = range(case.seed + 1000, case.seed + 1000 + self.draws)
        return dosed + [half.with_subspace(random_like(case.subspace, seed=seed)) for seed in seeds]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The effect at half the strength against random directions."""
        change = values - case.clean
        at_half = change[self.doses.index(0.5)]
        estimate, interval = mean_of(at_half, case.contrast.groups, seed=case.seed)
        null = range_of(change[len(self.doses) :].mean(1), f"{self.draws} random directions at half the strength")
        means = [0.0 if dose == 0 else float(change[i].mean()) for i, dose in enumerate(self.doses)]
        means.insert(2, 0.0)  # the clean run, between the negative and the positive doses
        steps = [b - a for a, b in pairwise(means)]
        sign = 1 if means[-1] >= 0 else -1
        monotone = sum(step * sign > 0 for step in steps)
        doses = ", ".join(
            f"{d:+g}: {m:+.2f}" for d, m in zip((*self.doses[:2], 0.0, *self.doses[2:]), means, strict=True)
        )
        note = f"{monotone} of {len(steps)} steps go the same way (mean effect by dose {doses})"
        claim = "half the dose already moves the behaviour beyond random directions"
        found = Finding("control.dose", claim, estimate, interval, null, len(case.contrast), note=note)
        found = found.judged("above" if sign > 0 else "below", margin=case.margin / 2)
        if found.verdict == "supported" and (monotone < len(steps) - 1 or abs(estimate) > abs(means[-1])):
            found = replace(found, verdict="inconclusive")
        return [found]
