"""What a guard's figures are without what it claims to have found: random directions, and labels that mean nothing."""

from dataclasses import dataclass, replace
from typing import cast, final

import numpy as np
import torch
from jaxtyping import Bool, Float64
from sklearn.base import clone

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Interval
from subspace_probe.core.intervals import range_of
from subspace_probe.finders.permuting import exchanged
from subspace_probe.guard.classifier import GuardClassifier
from subspace_probe.guard.group_draws import GroupDraws
from subspace_probe.guard.probe import LatentProbe
from subspace_probe.guard.ranked import AUROC, Ranked, Reading

RANDOM, SHUFFLES = 200, 40


@final
@dataclass(frozen=True, eq=False)
class Nulls:
    """Scores of the test prompts under each draw.

    Attributes:
        random: along directions drawn from the covariance of the training states within classes, shape [k, n].
        shuffled: by the probe refitted on shuffled training labels, shape [m, n].
    """

    random: Float64[np.ndarray, "k n"]
    shuffled: Float64[np.ndarray, "m n"]

    @classmethod
    def of(
        cls,
        guard: GuardClassifier,
        train: Contrast,
        states: Float64[np.ndarray, "t f"],
        rows: Float64[np.ndarray, "n f"],
        *,
        seed: int,
    ) -> "Nulls":
        """Draw them.

        Activations vary along few directions, so isotropic directions would be too weak a null; and the covariance
        of all states holds the very difference that is looked for. Hence random combinations of states less their
        class means: directions along which states vary for other reasons.

        Args:
            states: of the training prompts, at the guard's sites.
            rows: of the test prompts.
        """
        y, within = np.asarray(train.labels), states.copy()
        for label in (0, 1):
            within[y == label] -= states[y == label].mean(axis=0)
        mixed = np.random.default_rng(seed).standard_normal((RANDOM, len(states))) @ within
        return cls(mixed / np.sqrt(len(states)) @ rows.T, _shuffled(guard, train, states, rows, seed))

    def range(self, reading: Reading, prompts: GroupDraws, mask: Bool[np.ndarray, " n"] | None = None) -> Interval:
        """The range of a figure under the null that gives more of it.

        The sign of a random direction is the one that suits the prompts it is measured on, max(a, 1 - a): its labels
        are known to it, which makes the null stricter.
        """
        ranges = [
            range_of(torch.tensor(self.along_random(reading, prompts, mask)), "random directions, of the better sign"),
            range_of(torch.tensor(_values(self.shuffled, reading, prompts, mask)), "refits on shuffled labels"),
        ]
        return max(ranges, key=lambda found: found.high)

    def along_random(
        self, reading: Reading, prompts: GroupDraws, mask: Bool[np.ndarray, " n"] | None = None
    ) -> Float64[np.ndarray, " k"]:
        """The figure along every random direction, of the better sign."""
        return _values(self.random, reading, prompts, mask, oriented=True)


def _values(
    scores: Float64[np.ndarray, "k n"],
    reading: Reading,
    prompts: GroupDraws,
    mask: Bool[np.ndarray, " n"] | None,
    *,
    oriented: bool = False,
) -> Float64[np.ndarray, " k"]:
    chosen = np.ones(len(prompts.y), dtype=bool) if mask is None else mask
    some = prompts.where(chosen)
    ranked = [Ranked(row[chosen], some) for row in scores]
    return np.array([(_oriented(one) if oriented else one).value(reading) for one in ranked])


def _oriented(ranked: Ranked) -> Ranked:
    return ranked if ranked.value(AUROC) >= 0.5 else replace(ranked, scores=-ranked.scores)


def _shuffled(
    guard: GuardClassifier,
    train: Contrast,
    states: Float64[np.ndarray, "t f"],
    rows: Float64[np.ndarray, "n f"],
    seed: int,
) -> Float64[np.ndarray, "m n"]:
    labels, pairs, groups = (torch.tensor(column) for column in (train.labels, train.pairs, train.groups))
    found: list[Float64[np.ndarray, " n"]] = []
    for draw in range(SHUFFLES):
        drawn = exchanged(labels, pairs, groups, seed=seed + draw).numpy()
        if 0 < drawn.sum() < len(drawn):
            found.append(cast("LatentProbe", clone(guard.probe)).fit(states, drawn).decision_function(rows))
    return np.stack(found)
