"""Can the variable be read from it?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding, Verdict
from subspace_probe.core.intervals import auroc_of
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.held_out import halves
from subspace_probe.interventions.conditions import Condition


@final
@dataclass(frozen=True)
class Readable(CaseCheck):
    """Held-out AUROC of the variable from coordinates in the subspace.

    The difference of the class means in one half of the pairs reads the other half, and the reverse; scores are ranked
    within each half. Null: .5. Supported: at least `enough`, with the interval above .6; a variable that can be read
    is not thereby used (in a test bed LDA reads perfectly and never steers). Applies to every intervention with a
    subspace. It has a meaning for the verdict only beside an exchange without effect.
    """

    name: ClassVar[str] = "readable"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Can the variable be read from it?"
    on: ClassVar[Prompts] = "natural"

    enough: float = 0.9

    def missing(self, case: Case) -> str:
        """Needs a subspace."""
        return case.whole

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Needs states only."""
        return []

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """Cross-fitted between two halves of the pairs."""
        pairs = case.pairs
        coords = case.subspace.coords(pairs.base.double())
        labels, groups = pairs.row_labels, torch.tensor(pairs.prompts.groups)[pairs.prompt]
        parts = halves(pairs, seed=case.seed)
        if parts is None:
            return [case.untested(self, "the pairs are of one group, so nothing can be held out.")]
        scores = torch.zeros(len(coords), dtype=torch.float64)
        for fitted, read in (parts, parts[::-1]):
            means = [coords[fitted & (labels == label)].mean(0) for label in (0, 1)]
            own = coords[read] @ (means[1] - means[0])
            # equal scores get equal ranks: rows are in the order of their labels
            scores[read] = torch.searchsorted(own.sort().values, own).double() / len(own)
        value, interval = auroc_of(scores, labels, groups, seed=case.seed)
        verdict: Verdict = "inconclusive"
        if value >= self.enough and interval.low > 0.6:
            verdict = "supported"
        elif interval.high < self.enough:
            verdict = "refuted"
        note = f"held-out AUROC {value:.3f}"
        claim = "the variable can be read from the subspace"
        return [Finding("mechanism.readable", claim, value, interval, None, len(pairs), verdict, note=note)]
