"""Does more of the exchange do more?"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.interventions.conditions import Condition


@final
@dataclass(frozen=True)
class ExchangeDose(CaseCheck):
    """The exchange by parts: base + t (exchanged - base), t from -1 (away from the source) over 1 (the exchange) to
    1.5.

    Estimate: the share of the partners' difference at t = 1/2. Null: none; a linear effect has half of the whole one
    there. A faithful coordinate has most of its effect up to t = 1, where states are natural along it; an effect that
    only begins beyond is a push off the data. Supported where all steps but one go the way of the whole and t = 1
    brings about at least half of what t = 1.5 does; else inconclusive, and never decides: in the toy of three neurons
    effect is linear in t for truth and illusion alike. Applies to every intervention with a subspace; steering's own
    strengths are asked about by `dose`. Cannot see a pathway that is linear and dormant.
    """

    name: ClassVar[str] = "exchange_dose"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does more of the exchange do more?"
    on: ClassVar[Prompts] = "natural"

    doses: tuple[float, ...] = (-1.0, -0.5, 0.25, 0.5, 0.75, 1.0, 1.5)

    def missing(self, case: Case) -> str:
        """Needs a subspace."""
        return case.whole

    def conditions(self, case: Case) -> Sequence[Condition]:
        """One condition a dose."""
        pairs, inside = case.pairs, case.pairs.within(case.subspace)
        return [pairs.moved(dose * inside) for dose in self.doses]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The curve."""
        pairs = case.pairs
        estimate, interval = pairs.share_of(values[self.doses.index(0.5)], seed=case.seed)
        curve = dict(zip(self.doses, pairs.shares(values).mean(1).tolist(), strict=True)) | {0.0: 0.0}
        doses = sorted(curve)
        sign = 1 if curve[1.0] >= 0 else -1
        forward = [sign * (curve[b] - curve[a]) > 0 for a, b in pairwise(doses)]
        note = f"{sum(forward)} of {len(forward)} steps go the same way (share of the difference by part exchanged "
        note += f"{', '.join(f'{dose:+g}: {curve[dose]:.0%}' for dose in doses)})"
        claim = "the effect grows with the part exchanged, most of it up to the whole"
        steady = sum(forward) >= len(forward) - 1 and sign * curve[1.0] >= sign * curve[1.5] / 2
        verdict = "supported" if steady and sign * curve[1.0] > 0 else "inconclusive"
        return [Finding("mechanism.exchange_dose", claim, estimate, interval, None, len(pairs), verdict, note=note)]
