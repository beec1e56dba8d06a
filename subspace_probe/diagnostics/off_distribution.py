"""How far from the model's own states are those that the exchange makes?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import auroc_of
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.held_out import halves
from subspace_probe.diagnostics.reader_split import unreadable
from subspace_probe.interventions.conditions import Condition
from subspace_probe.linalg.ranking import auroc
from subspace_probe.linalg.shrinkage import inverse_times, oas


@final
@dataclass(frozen=True)
class OffDistribution(CaseCheck):
    """Distances of exchanged states from natural ones: Mahalanobis, residual of the principal components, neighbours.

    Fitted on one half of the pairs, measured on the other, natural states beside exchanged ones, and the reverse: (x -
    mean)^T S^-1 (x - mean) with S shrunk (Chen et al. 2010, OAS); |(1 - U U^T)(x - mean)| with U the components that
    hold 90 % of the variance; the mean distance of the five nearest neighbours; and the state's norm. Each also for the
    visible part of the move alone.

    Estimate: AUROC of telling exchanged from held-out natural states by the Mahalanobis distance. Null: held-out
    natural states, .5. It decides nothing: distance at the site does not tell truth from illusion (.71 for the true
    neuron of the toy, .61 for the illusion), neighbours and local components found wrong mechanisms at an AUROC of .35
    to .47, and harmless moves into the kernel were flagged 93 to 100 % of the time (Liu & Chen, planted pathways in
    GPT-2). Supported at `far` and below, else inconclusive. Applies to every intervention with a subspace. Cannot see
    what the model makes of the distance; steering is judged by the exchange too, not by its own strength.
    """

    name: ClassVar[str] = "off_distribution"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "How far from the model's own states are those that the exchange makes?"
    on: ClassVar[Prompts] = "natural"

    far: float = 0.75
    neighbours: int = 5
    kept: float = 0.9

    def missing(self, case: Case) -> str:
        """Needs pairs of several groups."""
        if case.whole or case.natural is None:
            return case.whole or case.no_natural
        return "" if halves(case.natural, seed=case.seed) else "the pairs are of one group, so nothing can be held out."

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Needs states only."""
        return []

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """Exchanged against held-out natural states."""
        pairs, inside = case.pairs, case.pairs.within(case.subspace).double()
        natural = self._distances(case, torch.zeros_like(inside))
        moved = self._distances(case, inside)
        groups = torch.tensor(pairs.prompts.groups)[pairs.prompt]
        both = torch.cat([torch.zeros(len(inside)), torch.ones(len(inside))]).long()
        told = torch.cat([natural, moved])
        estimate, interval = auroc_of(told[:, 0], both, groups.repeat(2), seed=case.seed)
        said = ", ".join(f"{name} {auroc(told[:, i], both):.2f}" for i, name in enumerate(_NAMES))
        ratio = float((pairs.base.double() + inside).norm(dim=1).mean() / pairs.base.double().norm(dim=1).mean())
        note = f"told from natural states (.5 is not at all): {said}; norm {ratio:.2f} times the natural one"
        if not unreadable(case):
            seen = pairs.read_space.rows.basis
            visible = torch.cat([natural, self._distances(case, inside @ seen.T @ seen)])
            note += f"; by what is read of the move: {', '.join(f'{auroc(visible[:, i], both):.2f}' for i in range(3))}"
        note += "; this tells no illusion from the truth"
        claim = "the exchange makes states such as the model's own"
        verdict = "supported" if estimate <= self.far else "inconclusive"
        return [Finding("mechanism.off_distribution", claim, estimate, interval, None, len(pairs), verdict, note=note)]

    def _distances(self, case: Case, move: Float[Tensor, "rows d"]) -> Float[Tensor, "rows 3"]:
        """Of moved states from the natural ones of the other half."""
        base = case.pairs.base.double()
        found = torch.zeros(len(base), 3, dtype=torch.float64)
        parts = halves(case.pairs, seed=case.seed) or ()
        for fitted, read in (parts, parts[::-1]) if parts else ():
            found[read] = distances(base[read] + move[read], base[fitted], self.neighbours, self.kept)
        return found


_NAMES = ("Mahalanobis", "outside the principal components", "nearest neighbours")


def distances(
    states: Float[Tensor, "rows d"], natural: Float[Tensor, "n d"], neighbours: int, kept: float
) -> Float[Tensor, "rows 3"]:
    """Mahalanobis distance with shrinkage, residual of the principal components, mean distance of the nearest.

    Of states wider than they are many, the covariance is taken in their span and one more coordinate, the length
    outside of it: nothing of d x d is made.
    """
    mean = natural.mean(0)
    centred, away = natural - mean, states - mean
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    span = axes[lengths > 1e-9 * lengths[0]]
    spread, coords = lengths[: len(span)].square() / max(1, len(natural) - 1), away @ span.T
    if len(span) < natural.shape[1]:
        outside = (away - coords @ span).norm(dim=1, keepdim=True)
        spread, coords = torch.cat([spread, spread.new_zeros(1)]), torch.cat([coords, outside], dim=1)
    covariance, _ = oas(torch.diag(spread), len(natural))
    mahalanobis = (inverse_times(covariance, coords) * coords).sum(1).clamp(min=0).sqrt()
    held = lengths.square().cumsum(0) / lengths.square().sum().clamp(min=1e-300)
    axes = axes[: int((held < kept).sum()) + 1]
    residual = (away - away @ axes.T @ axes).norm(dim=1)
    nearest = torch.cdist(states, natural).sort(dim=1).values[:, :neighbours].mean(1)
    return torch.stack([mahalanobis, residual, nearest], dim=1)
