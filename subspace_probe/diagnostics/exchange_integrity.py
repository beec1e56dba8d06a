"""Does exchanging a state for itself change nothing?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.interventions.conditions import Condition
from subspace_probe.linalg.bases import off_identity


@final
@dataclass(frozen=True)
class ExchangeIntegrity(CaseCheck):
    """The natural pairs' own states, captured before, put back in their places: what every exchange rests on.

    Estimate: the largest change of the metric; 0 up to rounding, whatever the subspace is. Refuted where it is more,
    for states that were captured at other tokens, of other prompts or in another precision than they are put back; then
    no finding on natural pairs means anything. The note gives the deviation of V V^T from the identity. Applies to
    every intervention with a subspace. Cannot see whether the pairs differ in the variable.
    """

    name: ClassVar[str] = "exchange_integrity"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does exchanging a state for itself change nothing?"
    on: ClassVar[Prompts] = "natural"

    def missing(self, case: Case) -> str:
        """Needs a subspace."""
        return case.whole

    def conditions(self, case: Case) -> Sequence[Condition]:
        """The bases, in their own places, and a clean run beside them."""
        return [case.pairs.moved(torch.zeros_like(case.pairs.base)), None]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """Against the clean run."""
        pairs, basis = case.pairs, case.subspace.basis
        worst = float((values[0] - values[1]).abs().max())
        # prompts of other lengths share the pass, which changes the order of sums; never by more than some roundings
        rounding = max(1e-4, 8 * torch.finfo(case.model.backend.dtype).eps)
        same = worst <= rounding * (abs(pairs.gap) + float(values[1].abs().max()))
        note = f"states put back where they came from change the metric by {worst:.2g}; the basis is "
        note += f"{off_identity(basis, basis):.2g} off orthonormal"
        claim = "exchanging a state for itself changes nothing"
        verdict = "supported" if same else "refuted"
        return [Finding("mechanism.exchange_integrity", claim, worst, n=len(pairs), verdict=verdict, note=note)]
