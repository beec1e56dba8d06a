"""Does any direction of the same length do it?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import range_of
from subspace_probe.core.subspaces import Subspace
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.interventions.conditions import Condition
from subspace_probe.linalg.bases import random_subspace


def random_like(subspace: Subspace, *, seed: int) -> Subspace:
    """A uniformly random subspace of the same rank, with the same steps, origin and site."""
    basis = random_subspace(subspace.rank, subspace.width, seed=seed)
    return replace(subspace, basis=basis.to(subspace.basis), reader=None, notes={"finder": "random", "seed": seed})


@final
@dataclass(frozen=True)
class RandomControls(CaseCheck):
    """The same intervention along random subspaces of the same rank and step.

    Null: the mean effect of `draws` of them. A real direction lies outside; an intervention that merely disturbs the
    model does not. Cannot see: a direction that works without being the model's own.
    """

    name: ClassVar[str] = "random"
    question: ClassVar[str] = "Does a random direction of the same length do the same?"

    draws: int = 100

    def frugal(self) -> "RandomControls":
        """With 40 draws: 39 are the fewest that a verdict can rest on."""
        return replace(self, draws=min(self.draws, 40))

    def missing(self, case: Case) -> str:
        """Needs a subspace."""
        return case.whole

    def conditions(self, case: Case) -> Sequence[Condition]:
        """One condition a draw."""
        seeds = range(case.seed, case.seed + self.draws)
        return [case.intervention.with_subspace(random_like(case.subspace, seed=seed)) for seed in seeds]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The effect against the range of the random ones."""
        null = range_of((values - case.clean).mean(1), f"{self.draws} random directions")
        return [case.finding(self.name, "the effect is beyond that of random directions of the same length", null=null)]
