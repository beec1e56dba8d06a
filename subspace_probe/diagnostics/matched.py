"""Does a direction along which the states vary anyway do the same?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import range_of
from subspace_probe.core.subspaces import Subspace
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.interventions.conditions import Condition
from subspace_probe.linalg.bases import orthonormalise


def matched_like(subspace: Subspace, states: Float[Tensor, "rows d"], *, seed: int) -> Subspace:
    """A random subspace of the same rank with directions of N(0, S), S the covariance of these states.

    Random combinations of the centred states have that distribution, and need no matrix of d x d. Steps, origin and
    site stay.
    """
    centred = states.double().cpu() - states.double().cpu().mean(0)
    drawn = torch.randn(subspace.rank, len(centred), generator=_seeded(seed), dtype=torch.float64)
    basis = orthonormalise(drawn @ centred)
    return replace(subspace, basis=basis.to(subspace.basis), reader=None, notes={"finder": "matched", "seed": seed})


@final
@dataclass(frozen=True)
class Matched(CaseCheck):
    """The same intervention along random subspaces drawn where the states vary, of the same rank and step.

    Directions of N(0, S), S the covariance of the natural pairs' states, or of those the subspace was found on; each
    with the length of the subspace's own step. Activations vary along few directions, and a push along these disturbs a
    model more than a uniformly random one: the stricter null. It is not free of the variable itself, along which states
    vary too, so that a real direction need not lie outside; it is refuted only where it has no effect at all.

    Null: the mean effect of `draws` of them. Supported: beyond all but 5 % of them. A faithful direction lies beyond or
    is among the strongest; one that only disturbs lies inside. Applies to every intervention with a subspace; to
    ablation and exchange by rank, since their step is the state's own. Cannot see a direction that works without being
    the model's own.
    """

    name: ClassVar[str] = "matched"
    question: ClassVar[str] = "Does a direction along which the states vary anyway do the same?"

    draws: int = 40

    def missing(self, case: Case) -> str:
        """Needs states of the site, more than the subspace has dimensions."""
        if case.whole:
            return case.whole
        states = self._states(case)
        if states is None:
            return "audit was given neither natural pairs nor what the subspace was found on (natural=..., refit=...)."
        rank = int(torch.linalg.matrix_rank(states.double() - states.double().mean(0)))
        if rank <= case.subspace.rank:
            return f"the {len(states)} states vary in {rank} dimensions only, the subspace has {case.subspace.rank}."
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """One condition a draw."""
        states = self._states(case)
        if states is None:
            return []
        seeds = range(case.seed + 4000, case.seed + 4000 + self.draws)
        return [case.intervention.with_subspace(matched_like(case.subspace, states, seed=seed)) for seed in seeds]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The effect against the range of the matched ones."""
        effects = (values - case.clean).mean(1)
        null = range_of(effects, f"{self.draws} random directions along which the states vary")
        beaten = float((effects.abs() < abs(case.effect()[0])).double().mean())
        note = f"larger than {beaten:.0%} of random directions along which the states vary ({null.low:+.2f} to "
        note += f"{null.high:+.2f}); these may contain the variable itself"
        claim = "the effect is beyond that of random directions along which the states vary"
        return [case.finding(self.name, claim, null=null, note=note)]

    def _states(self, case: Case) -> Tensor | None:
        if case.natural is not None:
            return case.natural.base
        site = case.subspace.site
        if case.acts is None or site is None or site not in case.acts.sites:
            return None
        return case.acts.at(site).float().cpu()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
