"""What a guard's figures are without what it claims to have found: random directions, and labels that mean nothing."""

from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float64

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.findings import Interval
from subspace_probe.core.intervals import range_of
from subspace_probe.finders.permuting import exchanged
from subspace_probe.guard.classifier import GuardClassifier
from subspace_probe.guard.group_draws import GroupDraws
from subspace_probe.guard.ranked import AUROC, Ranked, Reading

RANDOM, SHUFFLES = 200, 40


@final
@dataclass(frozen=True, eq=False)
class Nulls:
    """Scores of the test prompts under each draw.

    Attributes:
        random: along directions drawn from the covariance of the training states within classes, shape [k, n].
        shuffled: by the probe refitted on shuffled training labels, with shuffled labels of the test prompts too:
            where labels mean nothing, neither do. Measured by the true ones, a fit to minimal pairs of well separated
            classes would find the classes, one way round or the other, from any shuffle.
    """

    random: Float64[np.ndarray, "k n"]
    shuffled: tuple[Ranked, ...]

    @classmethod
    def of(
        cls,
        guard: GuardClassifier,
        train: Contrast,
        states: Float64[np.ndarray, "t f"],
        rows: Float64[np.ndarray, "n f"],
        prompts: GroupDraws,
    ) -> "Nulls":
        """Draw them.

        Activations vary along few directions, so isotropic directions would be too weak a null; and the covariance
        of all states holds the very difference that is looked for. Hence random combinations of states less their
        class means: directions along which states vary for other reasons.

        Args:
            states: of the training prompts, at the guard's sites.
            rows: of the test prompts.
            prompts: their labels and groups.
        """
        y, within = np.asarray(train.labels), states.copy()
        for label in (0, 1):
            within[y == label] -= states[y == label].mean(axis=0)
        mixed = np.random.default_rng(prompts.seed).standard_normal((RANDOM, len(states))) @ within
        return cls(mixed / np.sqrt(len(states)) @ rows.T, _shuffled(guard, train, states, rows, prompts))

    def range(self, reading: Reading, prompts: GroupDraws, mask: Bool[np.ndarray, " n"] | None = None) -> Interval:
        """The range of a figure under the null that gives more of it.

        The sign of a random direction is the one that suits the prompts it is measured on, max(a, 1 - a): its labels
        are known to it, which makes the null stricter.
        """
        chosen = np.ones(len(prompts.y), dtype=bool) if mask is None else mask
        parts = [one for drawn in self.shuffled if (one := drawn.where(chosen)).both]
        shuffled = torch.tensor([one.value(reading) for one in parts], dtype=torch.float64)
        random = torch.tensor(self.along_random(reading, prompts, chosen))
        ranges = [range_of(random, f"{len(random)} random directions, of the better sign")]
        if len(shuffled):
            ranges.append(range_of(shuffled, f"{len(shuffled)} refits and tests on shuffled labels"))
        return max(ranges, key=lambda found: found.high)

    def along_random(
        self, reading: Reading, prompts: GroupDraws, mask: Bool[np.ndarray, " n"] | None = None
    ) -> Float64[np.ndarray, " k"]:
        """The figure along every random direction, of the better sign."""
        chosen = np.ones(len(prompts.y), dtype=bool) if mask is None else mask
        some = prompts.where(chosen)
        return np.array([_oriented(Ranked(row[chosen], some)).value(reading) for row in self.random])


def _oriented(ranked: Ranked) -> Ranked:
    return ranked if ranked.value(AUROC) >= 0.5 else replace(ranked, scores=-ranked.scores)


def _shuffled(
    guard: GuardClassifier,
    train: Contrast,
    states: Float64[np.ndarray, "t f"],
    rows: Float64[np.ndarray, "n f"],
    prompts: GroupDraws,
) -> tuple[Ranked, ...]:
    labels, pairs, groups = (torch.tensor(column) for column in (train.labels, train.pairs, train.groups))
    tested, sources = torch.tensor(prompts.y.astype(np.int64)), torch.tensor(prompts.groups)
    found: list[Ranked] = []
    for seed in range(prompts.seed, prompts.seed + SHUFFLES):
        fitted = exchanged(labels, pairs, groups, seed=seed).numpy()
        read = exchanged(tested, sources, sources, seed=seed).numpy().astype(bool)
        if 0 < fitted.sum() < len(fitted) and 0 < read.sum() < len(read):
            try:
                scores = guard.refitted(states, fitted, train).decision_function(rows)
            except (ConfigError, DataError):  # shuffled labels can leave a method without what it needs
                continue
            found.append(Ranked(scores, replace(prompts, y=read)))
    return tuple(found)
