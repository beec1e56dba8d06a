"""Does the model vary by itself what the patch varies?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding, Verdict
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.natural import Natural
from subspace_probe.diagnostics.reader_split import gradient_passes, unreadable
from subspace_probe.interventions.conditions import Condition
from subspace_probe.interventions.steer import Steer
from subspace_probe.linalg.ranking import auroc


@final
@dataclass(frozen=True, eq=False)
class Coordinates:
    """Coordinates along the actuator, the visible part of a subspace: of natural states, and of patched ones.

    Attributes:
        natural: of the states as they are, shape [rows, k].
        patched: after the exchange within the subspace.
        labels: of each row's prompt, before the exchange.
    """

    natural: Float[Tensor, "rows k"]
    patched: Float[Tensor, "rows k"]
    labels: Tensor

    def z(self) -> float:
        """How far patched states lie from those of the class they imitate, in standard deviations: the worse class.

        sqrt(delta^T S^-1 delta / k) with the target class's covariance S; infinite where that class does not vary.
        """
        worst = 0.0
        for label in (0, 1):
            target, patched = self.natural[self.labels != label], self.patched[self.labels == label]
            delta = patched.mean(0) - target.mean(0)
            centred = target - target.mean(0)
            values, axes = torch.linalg.eigh(centred.T @ centred / max(1, len(target) - 1))
            along = delta @ axes
            far = along.abs() > 1e-6 * self.patched.abs().max()
            if bool((far & (values <= 1e-12 * self.natural.square().mean().clamp(min=1e-30))).any()):
                return math.inf
            worst = max(worst, float((along.square() / values.clamp(min=1e-30))[far].sum() / len(delta)) ** 0.5)
        return worst

    def separation(self) -> float:
        """d' between the two natural classes, the largest of any coordinate."""
        a, b = self.natural[self.labels == 1], self.natural[self.labels == 0]
        spread = ((a.var(0) + b.var(0)) / 2).sqrt().clamp(min=1e-30)
        return float(((a.mean(0) - b.mean(0)).abs() / spread).max())

    def outside(self) -> float:
        """Share of patched states outside the natural .1 to 99.9 % range of any coordinate."""
        low, high = natural_range(self.natural)
        return float(((self.patched < low) | (self.patched > high)).any(1).double().mean())

    def told_apart(self) -> float:
        """AUROC of the distance from the target class's mean, patched states against natural ones; .5 is faithful."""
        distances: list[Tensor] = []
        for states in (self.natural, self.patched):
            own = self.labels if states is self.natural else 1 - self.labels
            means = torch.stack([self.natural[self.labels == label].mean(0) for label in (0, 1)])
            distances.append((states - means[own]).norm(dim=1))
        labels = torch.cat([torch.zeros(len(distances[0])), torch.ones(len(distances[1]))]).long()
        return auroc(torch.cat(distances), labels)


def natural_range(natural: Float[Tensor, "rows k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """The .1 and 99.9 % quantiles of each coordinate."""
    bounds = torch.quantile(natural, torch.tensor([0.001, 0.999], dtype=natural.dtype), dim=0)
    return bounds[0], bounds[1]


def coordinates(case: Case) -> Coordinates | None:
    """Along the part of the subspace under audit that is read; None where none of it is."""
    pairs: Natural = case.pairs
    row = pairs.read_space.split(case.subspace).row
    if row is None:
        return None
    base, move = pairs.base.double() @ row.T, pairs.within(case.subspace).double() @ row.T
    return Coordinates(base, base + move, pairs.row_labels)


@final
@dataclass(frozen=True)
class Dormancy(CaseCheck):
    """Coordinates along the actuator A = orth(Pi V), the part of the subspace that is read, before and after exchange.

    Estimate: z, the distance of patched states from the class they imitate in its standard deviations, in the worse of
    the two classes. An illusion writes where the model itself is silent: 10 to 13 at GPT-2 small's MLP 8 (Makelov et
    al. 2023), 15.6 in the analytic bed, 21 to 1000 where constructed; infinite where the coordinate is constant.
    Faithful subspaces mostly stay below 3.3, but a quarter of constructed faithful directions reach 6 to 11: alone,
    this convicts nobody. Refuted from `dormant` on, supported up to `awake`.

    The note adds d' of the natural classes along A, the share of patched states outside the natural range, and the
    AUROC of telling them from natural ones; for steering, the largest strength within the natural range. Applies to
    every intervention with a subspace. Cannot see illusions that stay within the natural range.
    """

    name: ClassVar[str] = "dormancy"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does the model vary by itself what the exchange varies?"
    on: ClassVar[Prompts] = "natural"

    dormant: float = 6.0
    awake: float = 3.3

    def missing(self, case: Case) -> str:
        """Needs an orthogonal subspace, and something that reads the site."""
        return unreadable(case)

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Needs states only."""
        return []

    def passes(self, case: Case) -> int:
        """Gradients, where no weight reads the site; shared with the split."""
        return 0 if case.natural is None else gradient_passes(case) // 6

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """How far the patch moves states beyond where the model's own are."""
        claim = "the exchange moves what is read no further than the model does by itself"
        at = coordinates(case)
        if at is None:
            return [case.untested(self, "no part of the subspace is read.")]
        k, fewest = at.natural.shape[1], int(torch.bincount(at.labels, minlength=2).min())
        if fewest < 3 * (k + 1):
            return [case.untested(self, f"{fewest} states of a class say too little of the spread of {k} coordinates.")]
        z = at.z()
        verdict: Verdict = "refuted" if z >= self.dormant else "supported" if z <= self.awake else "inconclusive"
        note = (
            f"patched states lie {z:.1f} standard deviations from the class they imitate, {at.outside():.0%} of them "
        )
        note += f"outside the natural range (AUROC {at.told_apart():.2f}); the classes lie {at.separation():.1f} apart "
        note += "(illusions: 10 and more, faithful mostly < 3.3)"
        if isinstance(case.intervention, Steer) and (most := largest_strength(case, case.intervention)) is not None:
            note += f"; steering stays within the natural range up to strength {most:.2g}"
        return [Finding("mechanism.dormancy", claim, z, None, None, len(case.pairs), verdict, note=note)]


def largest_strength(case: Case, steer: Steer) -> float | None:
    """The strength that brings the median natural state to the edge of the natural range; None without such a step."""
    if steer.unit != "scale":
        return None
    pairs, row = case.pairs, case.pairs.read_space.split(case.subspace).row
    if row is None:
        return None
    natural, step = pairs.base.double() @ row.T, (steer.subspace.scale[:, None] * steer.subspace.basis).sum(0).double()
    low, high = natural_range(natural)
    along = row.double() @ step
    middle = natural.median(0).values
    room = torch.where(along > 0, high - middle, middle - low) / along.abs().clamp(min=1e-30)
    return float(room.min())
