"""Bootstrap draws of labelled prompts, by group and stratified by class, so that every draw has both classes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int

from subspace_probe.core.findings import Interval
from subspace_probe.core.intervals import mean_of
from subspace_probe.linalg.resampling import wilson_interval

Weights = Float64[np.ndarray, "draws n"]
FEW = 5
"""Fewer groups of a class give no interval: a bootstrap of four knows nothing of a fifth."""
_CELLS = 4_000_000


@final
@dataclass(frozen=True, eq=False)
class GroupDraws:
    """Whole groups are drawn, with replacement, among those that hold the same classes.

    Whatever is asked for is computed on the same draws, so that differences between guards are paired.

    Attributes:
        y: whether each prompt is positive, shape [n].
        groups: near-duplicates and common sources, shape [n].
    """

    y: Bool[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]
    draws: int = 1000
    seed: int = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Groups that hold a negative, and groups that hold a positive."""
        return len(np.unique(self.groups[~self.y])), len(np.unique(self.groups[self.y]))

    def where(self, mask: Bool[np.ndarray, " n"]) -> "GroupDraws":
        """Draws of some of the prompts."""
        return replace(self, y=self.y[mask], groups=self.groups[mask])

    def weights(self) -> Iterator[Weights]:
        """How often each prompt is drawn, in blocks of bounded memory; the same at every call."""
        names, index = np.unique(self.groups, return_inverse=True)
        held = np.zeros((len(names), 2), dtype=bool)
        held[index, self.y.astype(int)] = True
        strata = [np.flatnonzero((held == kind).all(axis=1)) for kind in np.unique(held, axis=0)]
        rng = np.random.default_rng(self.seed)
        step = max(1, _CELLS // len(self.y))
        for start in range(0, self.draws, step):
            size = min(step, self.draws - start)
            drawn = np.zeros((size, len(names)))
            for stratum in strata:
                picked = stratum[rng.integers(len(stratum), size=(size, len(stratum)))]
                np.add.at(drawn, (np.arange(size)[:, None], picked), 1.0)
            yield drawn[:, index]

    def of(self, statistic: Callable[[Weights], Float64[np.ndarray, " draws"]]) -> Float64[np.ndarray, " draws"]:
        """A statistic of every draw."""
        return np.concatenate([statistic(weights) for weights in self.weights()])

    def interval(
        self,
        statistic: Callable[[Weights], Float64[np.ndarray, " draws"]],
        estimate: float,
        *,
        n: int | None = None,
    ) -> Interval:
        """95 % interval of a figure between 0 and 1: percentiles of the draws.

        At 0 and 1 all draws are alike and say nothing of prompts that were not seen: there it is Wilson's for `n`
        groups, by default as many as the rarer class has; and also nearer to them than half a group, or a figure that
        is nearly perfect would be surer than a perfect one. Fewer than five groups of a class give none.
        """
        n = min(self.counts) if n is None else n
        if min(*self.counts, n) < FEW:
            return Interval(float("nan"), float("nan"), of=f"{min(*self.counts, n)} groups of a class: no interval")
        if self.at_edge(estimate, n):
            _, low, high = wilson_interval(n if estimate > 0.5 else 0, n)
            return Interval(low, high, of=f"{n} groups of prompts, Wilson")
        low, high = (float(end) for end in np.quantile(self.of(statistic), [0.025, 0.975]))
        return Interval(low, high, of="groups of prompts, stratified bootstrap")

    def at_edge(self, estimate: float, n: int | None = None) -> bool:
        """Whether a figure is nearer to 0 or 1 than half a group of `n`."""
        n = min(self.counts) if n is None else n
        return 2 * n * min(estimate, 1 - estimate) < 1


def share_of(values: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"], *, seed: int) -> tuple[float, Interval]:
    """Share of prompts with its 95 % interval by group; Wilson's where it is 0 or 1."""
    return mean_of(torch.tensor(values, dtype=torch.float64), groups.tolist(), seed=seed)
