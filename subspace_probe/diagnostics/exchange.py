"""Does exchanging it between prompts move the behaviour, as the variable does? (sufficiency)"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding, judge_absence
from subspace_probe.core.intervals import range_of
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.interventions.conditions import Condition

NOTHING = 0.25
"""Half-width, as a share of the partners' difference, of what counts as no effect: half of what would change an answer.

Where a direction is certified as not used, exchanging it moves .00 to .07 of the difference; a reader such as LDA,
which shares a component with what is used, .17 (.34 fitted on 48 prompts); what is used moves .5 and more."""


@final
@dataclass(frozen=True)
class Exchange(CaseCheck):
    """Interchange of the component in the subspace between the partners of natural pairs.

    Estimate: the share of the partners' difference in the metric that it brings about, mean(change) / mean(difference)
    (FLDD, Makelov et al. 2023; 0 nothing, 1 all, above 1 overshoot), towards either side. The note gives interchange
    accuracy too: how many prompts come nearer to their partner's value. Null: random subspaces of the same rank.

    Supported: beyond the null, and at least half of the prompts change sides. Refuted: the interval lies within
    `margin` of nothing, an equivalence that no p-value could show; not so where it is above `some` and most of what
    the whole state does: the site then carries little, and this carries it. Faithful subspaces reach .8 to 1.4; so do
    illusory ones, which is why this alone is no verdict. Applies to every intervention with a subspace. Cannot see
    whether the effect is made by the patch itself: see containment.
    """

    name: ClassVar[str] = "exchange"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does exchanging it between prompts that differ in the variable move the behaviour?"
    on: ClassVar[Prompts] = "natural"

    draws: int = 40
    margin: float = NOTHING
    some: float = 0.05

    def missing(self, case: Case) -> str:
        """Needs a subspace."""
        return case.whole

    def conditions(self, case: Case) -> Sequence[Condition]:
        """The subspace, then random ones, then the whole state."""
        pairs = case.pairs
        seeds = range(case.seed + 3000, case.seed + 3000 + self.draws)
        moves = [case.subspace, *(random_like(case.subspace, seed=seed) for seed in seeds)]
        return [*(pairs.moved(pairs.within(subspace)) for subspace in moves), pairs.moved(pairs.difference)]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The share restored, against random subspaces."""
        pairs = case.pairs
        estimate, interval = pairs.share_of(values[0], seed=case.seed)
        randoms = values[1:-1]
        null = range_of(pairs.shares(randoms).mean(1), f"{self.draws} random subspaces of the same rank")
        flipped = float(pairs.flips(values[0]).double().mean())
        chance = float(pairs.flips(randoms).double().mean())
        whole = float(pairs.shares(values[-1]).mean())
        note = f"exchanging it moves {estimate:z.0%} of the difference and changes the side of {flipped:.0%} of prompts"
        note += f" (random subspaces: {null.low:z.0%} to {null.high:z.0%}, and {chance:.0%})"
        claim = "exchanging the subspace changes the side of at least half of the prompts, beyond random subspaces"
        found = Finding("mechanism.exchange", claim, estimate, interval, null, len(pairs), note=note)
        if judge_absence(interval, margin=self.margin) == "supported":
            if interval.low > max(self.some, null.high) and estimate >= whole / 2:
                part = f"{note}; little, but most of what the whole state does there ({whole:.0%})"
                return [replace(found, verdict="inconclusive", note=part)]
            return [replace(found, verdict="refuted")]
        if interval.high < -self.margin:
            return [replace(found, verdict="inconclusive", note=f"{note}; away from the partner")]
        found = found.judged("above", margin=0.0)
        if found.verdict != "unaudited" and (found.verdict != "supported" or flipped < 0.5):
            found = replace(found, verdict="inconclusive")
        return [found]
