"""Where do the classes lie apart: in what is read, or in what is not?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.dormancy import Coordinates
from subspace_probe.diagnostics.reader_split import unreadable
from subspace_probe.interventions.conditions import Condition


@final
@dataclass(frozen=True)
class Sensor(CaseCheck):
    """Separation d' of the natural classes along the visible part orth(Pi V), and along the invisible one.

    d' is the difference of the class means over the pooled standard deviation, the largest of any coordinate of the
    part; beside it |cos| of the mean difference D with either part (Makelov et al. 2023, arXiv:2311.17030).

    Estimate: d' of the visible part. Null: none; the invisible part is the comparison. An illusion senses where nothing
    reads: 39.8 against .06 in the analytic bed (measured: inconclusive for 11 of 14 illusory and for none of 14
    faithful directions); |cos| of D .9 with the invisible part and .4 with the visible one in factual recall. Of a
    faithful subspace the visible part separates at least comparably: supported from half of the invisible part's on,
    else inconclusive. Never decides: separation is correlation, and a faithful distributed code may lie mostly where
    nothing reads (Wu et al. 2024, arXiv:2401.12631). Applies to every intervention with a subspace. Cannot see what is
    used.
    """

    name: ClassVar[str] = "sensor"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Do the classes lie apart in what is read, or in what nothing reads?"
    on: ClassVar[Prompts] = "natural"

    comparable: float = 0.5

    def missing(self, case: Case) -> str:
        """Needs an orthogonal subspace, and something that reads the site."""
        return unreadable(case)

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Needs states only."""
        return []

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """Separation along either part."""
        pairs = case.pairs
        split, labels = pairs.read_space.split(case.subspace), pairs.row_labels
        base = pairs.base.double()
        away = base[labels == 1].mean(0) - base[labels == 0].mean(0)
        apart: list[float] = []
        cosines: list[float] = []
        for part in (split.row, split.null):
            at = None if part is None else base @ part.double().T
            apart.append(0.0 if at is None else Coordinates(at, at, labels).separation())
            cosines.append(0.0 if part is None else float((part.double() @ away).norm() / away.norm().clamp(min=1e-30)))
        note = (
            f"the classes lie {apart[0]:.1f} standard deviations apart along what is read of it, {apart[1]:.1f} along "
            f"what is not (an illusion: .06 and 39.8); |cos| with the mean difference {cosines[0]:.2f} and "
            f"{cosines[1]:.2f}; reader: {pairs.read_space}"
        )
        claim = "the variable can be told where later layers look"
        verdict = "supported" if apart[0] >= self.comparable * apart[1] else "inconclusive"
        return [Finding("mechanism.sensor", claim, apart[0], None, None, len(pairs), verdict, note=note)]
