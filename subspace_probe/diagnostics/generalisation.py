"""Does it work on other prompts than those it was found on?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import DataError, PositionError
from subspace_probe.core.findings import Finding, Interval, Verdict
from subspace_probe.core.intervals import mean_of
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.interventions.patch import Patch
from subspace_probe.interventions.steer import Steer


@final
@dataclass(frozen=True)
class Generalisation(CaseCheck):
    """The mean effect on the prompts under audit beside that on the prompts the subspace was found on.

    Of those it was found on, such as are like those under audit: of the same label where the latter have one only, and
    of the same value of every factor that they all share. Estimate: the gap, effect where it was found less effect
    under audit, with the interval of a difference of two independent means. Null: no gap.

    Supported: the effect under audit is at least `keeps` of the other, by its interval. Refuted: less than `loses` of
    it, by both intervals; a direction fitted to its own prompts. A faithful direction loses little; a subspace trained
    on one pair is not tested at all. Applies to interventions that fit any prompts: not to an exchange with states of
    stated prompts, nor to strengths by prompt. Cannot see whether other wordings, data or models would do.
    """

    name: ClassVar[str] = "generalisation"
    question: ClassVar[str] = "Does it work on other prompts than those it was found on?"

    keeps: float = 0.5
    loses: float = 0.25
    most: int = 64

    def missing(self, case: Case) -> str:
        """Needs the prompts the subspace was found on, and others."""
        if case.whole:
            return case.whole
        if case.acts is None:
            return "audit was not told on what the subspace was found (refit=...)."
        if isinstance(case.intervention, Patch) and case.intervention.source.prompt is not None:
            return "the states it puts in belong to the prompts under audit."
        if isinstance(case.intervention, Steer) and len(case.intervention.strengths) > 1:
            return "its strengths belong to the prompts under audit."
        if not len(self._found_on(case)):
            return "none of the prompts that the subspace was found on are like those under audit, and other prompts."
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Runs on its own prompts."""
        return []

    def passes(self, case: Case) -> int:
        """Its own prompts, without and with the intervention."""
        return 2 * len(self._found_on(case))

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The two effects."""
        seen = self._found_on(case)
        try:
            clean, edited = outcomes(case.model, seen.prompts, [None, case.intervention], [case.metric])[0]
        except (DataError, PositionError) as error:  # what it adds, or where, is stated for the prompts under audit
            return [case.untested(self, str(error))]
        there, spread = mean_of(edited - clean, seen.groups, seed=case.seed)
        here, own = case.effect()
        gap = there - here
        low = gap - ((there - spread.low) ** 2 + (own.high - here) ** 2) ** 0.5
        high = gap + ((spread.high - there) ** 2 + (here - own.low) ** 2) ** 0.5
        note = f"mean effect {here:+.2f} on the prompts under audit, {there:+.2f} on {len(seen)} like them that the "
        note += "subspace was found on"
        claim = "the effect is no smaller on prompts that the subspace was not found on"
        interval = Interval(low, high, of="two sets of prompts, difference of means")
        verdict = self._judged(own, spread, case.margin)
        return [Finding("control.generalisation", claim, gap, interval, None, len(case.contrast), verdict, note=note)]

    def _judged(self, own: Interval, spread: Interval, margin: float) -> Verdict:
        """Both effects in the direction of the one where the subspace was found."""
        if spread.low <= margin and spread.high >= -margin:
            return "inconclusive"  # there is no effect that could be lost
        sign = 1 if spread.low > 0 else -1
        here = sorted((sign * own.low, sign * own.high))
        there = sorted((sign * spread.low, sign * spread.high))
        if here[0] >= self.keeps * there[1]:
            return "supported"
        return "refuted" if here[1] < self.loses * there[0] else "inconclusive"

    def _found_on(self, case: Case) -> Contrast:
        if case.acts is None:
            return case.contrast.take([])
        found = alike(case.acts.contrast, case.contrast)
        return found.take(range(min(self.most, len(found))))


def alike(found: Contrast, audited: Contrast) -> Contrast:
    """The prompts of one contrast that share what all prompts of another have in common, and are not among them.

    A contrast that was relabelled by a factor keeps its old label as factor "label"; that is the one compared then.
    """
    label = found.factors.get("label", found.labels) if "label" not in audited.factors else found.labels
    columns = {"": (label, audited.labels)}
    columns |= {
        name: (found.factors[name], column) for name, column in audited.factors.items() if name in found.factors
    }
    shared = [(column, set(other)) for column, other in columns.values() if len(set(other)) == 1]
    rows = [
        row
        for row, prompt in enumerate(found.prompts)
        if prompt not in audited.prompts and all(column[row] in values for column, values in shared)
    ]
    return found.take(rows)
