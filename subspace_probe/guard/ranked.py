"""Scores of labelled prompts: figures that are read off their curves, with intervals that never shrink to a point."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float64

from subspace_probe.core.findings import Interval
from subspace_probe.core.intervals import range_of
from subspace_probe.finders.permuting import exchanged
from subspace_probe.guard.curves import Curves
from subspace_probe.guard.group_draws import GroupDraws, Weights


@final
@dataclass(frozen=True)
class Reading:
    """One figure that is read off a curve.

    Attributes:
        of: from curves to one figure each.
        positives: whether it is a share of positives, so that they alone say how sure it is.
    """

    of: Callable[[Curves], Float64[np.ndarray, " curves"]]
    positives: bool = False


AUROC = Reading(Curves.auroc)
AUPRC = Reading(Curves.average_precision)


def tpr_at(fpr: float) -> Reading:
    """Share of positives flagged where this share of negatives is; the threshold is set anew on every draw."""
    return Reading(lambda curves: curves.tpr_at(fpr), positives=True)


@final
@dataclass(frozen=True, eq=False)
class Ranked:
    """Scores and the labels of the prompts they belong to.

    Attributes:
        scores: higher meaning positive, shape [n].
        prompts: their labels and groups, and how they are drawn.
    """

    scores: Float64[np.ndarray, " n"]
    prompts: GroupDraws

    @property
    def y(self) -> Bool[np.ndarray, " n"]:
        """Whether each prompt is positive."""
        return self.prompts.y

    @property
    def both(self) -> bool:
        """Whether there are prompts of both classes, so that there is a curve at all."""
        return bool(self.y.any() and not self.y.all())

    def where(self, mask: Bool[np.ndarray, " n"]) -> "Ranked":
        """Some of the prompts."""
        return replace(self, scores=self.scores[mask], prompts=self.prompts.where(mask))

    def curve(self) -> Curves:
        """The curve of the prompts as they are."""
        return Curves(self.scores, self.y)

    def value(self, reading: Reading) -> float:
        """The figure."""
        return float(reading.of(self.curve())[0])

    def interval(self, reading: Reading) -> Interval:
        """95 % interval of the figure; see `GroupDraws.interval`."""
        n = self._counted(reading)
        return self.prompts.interval(lambda weights: self._drawn(reading, weights), self.value(reading), n=n)

    def above(self, other: "Ranked", reading: Reading) -> tuple[float, Interval]:
        """How much higher the figure is than that of other scores of the same prompts, and its 95 % interval.

        Where one of them is perfect, or nearly, its draws are all but alike, and the interval is made of the two
        figures' own as if these were independent (Zou & Donner 2008, https://doi.org/10.1002/sim.3095), which is wider
        than a paired one.
        """
        first, second = self.value(reading), other.value(reading)
        one, two = self.interval(reading), other.interval(reading)
        if one.low != one.low or two.low != two.low:
            return first - second, Interval(float("nan"), float("nan"), of=one.of)
        n = self._counted(reading)
        if self.prompts.at_edge(first, n) or self.prompts.at_edge(second, n):
            low = first - second - float(np.hypot(first - one.low, two.high - second))
            high = first - second + float(np.hypot(one.high - first, second - two.low))
            return first - second, Interval(low, high, of="both figures' own intervals")
        drawn = self.prompts.of(lambda weights: self._drawn(reading, weights) - other._drawn(reading, weights))
        low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
        return first - second, Interval(low, high, of="groups of prompts, paired stratified bootstrap")

    def null(self, reading: Reading, *, draws: int = 200) -> Interval:
        """The range of the figure where labels say nothing: they are exchanged as the design of the prompts allows."""
        labels, groups = torch.tensor(self.y.astype(np.int64)), torch.tensor(self.prompts.groups)
        values = np.full(draws, np.nan)
        for draw in range(draws):
            drawn = exchanged(labels, groups, groups, seed=self.prompts.seed + draw).numpy().astype(bool)
            values[draw] = replace(self, prompts=replace(self.prompts, y=drawn)).value(reading)
        return range_of(torch.tensor(values), f"{draws} exchanges of the labels of these prompts")

    def _counted(self, reading: Reading) -> int | None:
        return self.prompts.counts[1] if reading.positives else None

    def _drawn(self, reading: Reading, weights: Weights) -> Float64[np.ndarray, " draws"]:
        return reading.of(Curves(self.scores, self.y, weights))
