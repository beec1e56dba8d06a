"""Could this site host an illusion of full strength, whatever the truth is?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import mean_of
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.held_out import by_prompt, halves
from subspace_probe.diagnostics.natural import Natural
from subspace_probe.interventions.conditions import Condition
from subspace_probe.linalg.angles import overlap
from subspace_probe.linalg.illusions import capacity, linearised_optimum


@final
@dataclass(frozen=True)
class Capacity(CaseCheck):
    """Illusion capacity IC = mean (|D||G| - D.G) / 2, beside the whole exchange C = mean D.G, to first order.

    D is source minus base, G the metric's gradient averaged from base to source, in units of the partners' difference:
    C + IC bounds what a patch of rank one can do (closed form: the larger eigenvalue of (D G^T + G D^T) / 2, one pair
    at a time), and it correlates .98 with what trained interchange reached at 42 MLP sites. The subspace of the same
    rank that does most to first order, over all pairs, is fitted on one half of them and run on the other, and the
    reverse.

    Estimate: IC. Null: none; IC is a property of the site and not of the subspace. At `full` and above the site can
    host an illusion of full strength whatever the truth, so the effect of the exchange alone says nothing:
    inconclusive, as where that subspace changes so many more answers than the whole state does; else supported. Never
    decides. In the toy of three neurons IC of the illusory component is 1, its C 0;
    measured: .07 to .25 at 14 faithful directions of the residual stream, .41 to 1.75 at MLPs with 14 illusory ones. A
    faithful subspace does about what the optimum does on held-out pairs (.96 against .99); an illusory one points along
    it (|cos| .99999 in the analytic bed). Applies to every intervention with a subspace, and a metric with a gradient.
    Cannot see which of both it is, and to first order only. (Makelov et al. 2023, arXiv:2311.17030, sections 3 and 5,
    for what is bounded.)
    """

    name: ClassVar[str] = "capacity"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Could this site host an illusion of full strength, whatever the truth is?"
    on: ClassVar[Prompts] = "natural"

    full: float = 0.5

    def missing(self, case: Case) -> str:
        """Needs an orthogonal subspace, a differentiable metric, and something that reads the site."""
        if case.whole or case.natural is None:
            return case.whole or case.no_natural
        try:
            case.subspace.require_projection("compared with the strongest patch")
            read = bool(case.natural.path_gradients.any())
        except ConfigError as error:
            return str(error)
        return "" if read else "nothing that is computed from the site reaches the metric."

    def conditions(self, case: Case) -> Sequence[Condition]:
        """The subspace, the strongest of its rank to first order, and the whole state."""
        pairs = case.pairs
        moves = (pairs.within(case.subspace), self._strongest(case), pairs.difference)
        return [pairs.moved(move) for move in moves]

    def passes(self, case: Case) -> int:
        """Gradients along the path; elsewhere the split by the reader has them already."""
        return 6 * len(case.pairs) if case.pairs.site.stream in ("mlp_post", "z") else 0

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """Capacity of the site, and what its strongest patch does."""
        pairs = case.pairs
        d, g = pairs.difference.double(), pairs.path_gradients.double()
        whole = float(by_prompt(pairs, (d * g).sum(1)).mean())
        estimate, interval = mean_of(by_prompt(pairs, capacity(d, g)), pairs.prompts.groups, seed=case.seed)
        flips, shares = pairs.flips(values).double().mean(1).tolist(), pairs.shares(values).mean(1).tolist()
        best = optimum(pairs, case.subspace.rank)
        cosine = overlap(best, case.subspace.basis.double().cpu()) ** 0.5 if len(best) else 0.0
        note = (
            f"to first order the whole exchange moves {whole:.0%} of the difference, and the best patches of one "
            f"dimension {whole + estimate:.0%}; the strongest subspace of rank {case.subspace.rank}, run on held-out "
            f"pairs, moves {shares[1]:.0%} and changes the side of {flips[1]:.0%} of prompts, this one {shares[0]:.0%} "
            f"and {flips[0]:.0%}; |cos| between them {cosine:.2f} (an illusion at full strength needs "
            f"{self.full:.0%} beyond the whole exchange, here {estimate:.0%} to first order; the whole, run, changes "
            f"{flips[2]:.0%})"
        )
        claim = "the site cannot host an illusion of full strength"
        # gradients see no pathway that is silent along the whole way from base to source, but what was run may use one
        hosted = flips[1] - flips[2] >= self.full
        verdict = "supported" if interval.high < self.full and not hosted else "inconclusive"
        return [Finding("mechanism.capacity", claim, estimate, interval, None, len(pairs), verdict, note=note)]

    def _strongest(self, case: Case) -> Float[Tensor, "rows d"]:
        """What exchanging the strongest subspace moves, each half of the pairs by that of the other."""
        pairs = case.pairs
        parts = halves(pairs, seed=case.seed)
        if parts is None:
            return pairs.along(optimum(pairs, case.subspace.rank))
        moved = torch.zeros_like(pairs.base)
        for own, other in (parts, parts[::-1]):
            moved[own] = pairs.along(optimum(pairs, case.subspace.rank, other))[own]
        return moved


def optimum(pairs: Natural, rank: int, rows: Tensor | None = None) -> Float64[Tensor, "k d"]:
    """The subspace of at most this rank whose exchange does most to first order, over some of the rows."""
    chosen = torch.ones(len(pairs.base), dtype=torch.bool) if rows is None else rows
    return linearised_optimum(pairs.difference[chosen], pairs.path_gradients[chosen], rank)[1]
