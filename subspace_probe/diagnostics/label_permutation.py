"""Is it the labels, or would any difference of means do?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import range_of
from subspace_probe.core.protocols import Finder
from subspace_probe.core.subspaces import Subspace
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.finders.permuting import quick, shuffled
from subspace_probe.interventions.conditions import Condition


def permuted_fits(finder: Finder, acts: Activations, like: Subspace, *, draws: int, seed: int) -> list[Subspace]:
    """Subspaces found under permuted labels, each with its own steps, as the same pipeline would have used them."""
    fits: list[Subspace] = []
    site, refitted = like.site or acts.sites[0], quick(finder)
    for draw in range(seed, seed + draws):
        fit = refitted.fit(shuffled(finder, acts, seed=draw), site)
        fits.append(replace(fit, notes={"finder": "permuted"}))
    return fits


@final
@dataclass(frozen=True)
class LabelPermutation(CaseCheck):
    """The same finder on the same activations under permuted labels, used in the same way.

    Null: the mean effect of `draws` such directions, each with its own natural step, which is what the pipeline would
    have found had the labels meant nothing. Labels are exchanged as the groups allow. Cannot see: a confound that
    travels with the labels, nor whether any direction of large variance would do at this step.
    """

    name: ClassVar[str] = "permutation"
    question: ClassVar[str] = "Does the direction found under shuffled labels do the same?"

    draws: int = 50

    def missing(self, case: Case) -> str:
        """Needs the finder and what it was fitted on."""
        return case.no_refit

    def conditions(self, case: Case) -> Sequence[Condition]:
        """One condition a draw."""
        if case.finder is None or case.acts is None:
            return []
        fits = permuted_fits(case.finder, case.acts, case.subspace, draws=self.draws, seed=case.seed)
        return [case.intervention.with_subspace(fit) for fit in fits]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The effect against the range under permuted labels."""
        null = range_of((values - case.clean).mean(1), f"{self.draws} directions from permuted labels")
        return [
            case.finding(self.name, "the effect is beyond that of directions found under shuffled labels", null=null)
        ]
