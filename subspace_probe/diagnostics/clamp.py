"""Does the effect survive where the part that acts is kept within its natural range?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding, Verdict
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.dormancy import coordinates, natural_range
from subspace_probe.diagnostics.reader_split import unreadable
from subspace_probe.interventions.conditions import Condition


@final
@dataclass(frozen=True)
class Clamp(CaseCheck):
    """The exchange within the subspace, its actuator coordinates A^T h (A = orth(Pi V)) clamped to their natural range.

    The range is that of .1 to 99.9 % over both classes; that of the target class alone would be an intervention by
    itself. Estimate: the loss, IIA(V) - IIA(V clamped). Illusory .56 to 1 where constructed, .4 in the middle where
    trained; faithful at most .01, MLPs as trained at most .21. Refuted from `lost` on, supported up to `kept`. The
    clamp-only effect is reported beside: it must be none. Applies to every intervention with a subspace. Cannot see
    illusions within the natural range, nor cancellation.
    """

    name: ClassVar[str] = "clamp"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does the effect survive where what acts is kept within its natural range?"
    on: ClassVar[Prompts] = "natural"

    lost: float = 0.3
    kept: float = 0.1

    def missing(self, case: Case) -> str:
        """Needs an orthogonal subspace, and something that reads the site."""
        return unreadable(case)

    def conditions(self, case: Case) -> Sequence[Condition]:
        """The exchange, the exchange clamped, the clamp alone."""
        pairs, at = case.pairs, coordinates(case)
        row = pairs.read_space.split(case.subspace).row
        inside = pairs.within(case.subspace)
        if at is None or row is None:
            return [pairs.moved(inside)]
        low, high = natural_range(at.natural)
        back = [(c.clamp(low, high) - c) @ row for c in (at.patched, at.natural)]
        return [pairs.moved(move) for move in (inside, inside + back[0].float(), back[1].float())]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """What is lost by the clamp."""
        if len(values) < 3:
            return [case.untested(self, "no part of the subspace is read.")]
        pairs = case.pairs
        flips = pairs.flips(values).double()
        claim = "the effect does not need values that the model never takes by itself"
        whole, clamped, alone = flips.mean(1).tolist()
        if whole < 0.5:
            return [case.untested(self, f"the subspace changes the side of {whole:.0%} of prompts only.")]
        estimate, interval = pairs.rate_of(flips[0] - flips[1], seed=case.seed)
        verdict: Verdict = "inconclusive"
        if estimate >= self.lost:
            verdict = "refuted"
        elif estimate <= self.kept:
            verdict = "supported"
        note = f"clamped to its natural range it changes the side of {clamped:.0%} of prompts, free {whole:.0%}; the "
        note += f"clamp alone {alone:.0%} (loss in illusions .4 to 1, faithful at most .01)"
        return [Finding("mechanism.clamp", claim, estimate, interval, None, len(pairs), verdict, note=note)]
