"""What a guard's figures are without what it claims to have found: random directions, and labels that mean nothing."""

from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float64
from sklearn.base import clone

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Interval
from subspace_probe.core.intervals import range_of
from subspace_probe.finders.permuting import exchanged
from subspace_probe.guard.group_draws import GroupDraws
from subspace_probe.guard.guard import LatentGuard
from subspace_probe.guard.ranked import AUROC, Ranked, Reading

RANDOM, SHUFFLES = 200, 40


@final
@dataclass(frozen=True, eq=False)
class Nulls:
    """Scores of the test prompts under each draw.

    Attributes:
        random: along directions drawn from the covariance of the training states, shape [k, n].
        shuffled: by the probe refitted on shuffled training labels, shape [m, n].
    """

    random: Float64[np.ndarray, "k n"]
    shuffled: Float64[np.ndarray, "m n"]

    @classmethod
    def of(
        cls, guard: LatentGuard, train: Contrast, states: Float64[np.ndarray, "t f"], rows: Float64[np.ndarray, "n f"],
        *, seed: int,
    ) -> "Nulls":  # fmt: skip
        """Draw them.

        A random direction of the states' own covariance is a random combination of centred states: activations vary
        along few directions, so that isotropic ones would be too weak a null, and wide ones need no covariance.

        Args:
            states: of the training prompts, at the guard's sites.
            rows: of the test prompts.
        """
        mixed = np.random.default_rng(seed).standard_normal((RANDOM, len(states))) @ (states - states.mean(axis=0))
        return cls((rows @ (mixed / np.sqrt(len(states))).T).T, _shuffled(guard, train, states, rows, seed))

    def range(self, reading: Reading, prompts: GroupDraws, mask: Bool[np.ndarray, " n"] | None = None) -> Interval:
        """The range of a figure under the null that gives more of it.

        The sign of a random direction is the one that suits the prompts it is measured on, max(a, 1 - a): its labels
        are known to it, which makes the null stricter.
        """
        chosen = np.ones(len(prompts.y), dtype=bool) if mask is None else mask
        some = prompts.where(chosen)
        random = [_oriented(Ranked(row[chosen], some)).value(reading) for row in self.random]
        shuffled = [Ranked(row[chosen], some).value(reading) for row in self.shuffled]
        ranges = [
            range_of(torch.tensor(random), f"{len(random)} random directions, of the better sign"),
            range_of(torch.tensor(shuffled), f"{len(shuffled)} refits on shuffled labels"),
        ]
        return max(ranges, key=lambda found: found.high)


def _oriented(ranked: Ranked) -> Ranked:
    return ranked if ranked.value(AUROC) >= 0.5 else replace(ranked, scores=-ranked.scores)


def _shuffled(
    guard: LatentGuard, train: Contrast, states: Float64[np.ndarray, "t f"], rows: Float64[np.ndarray, "n f"], seed: int
) -> Float64[np.ndarray, "m n"]:
    labels, pairs, groups = (torch.tensor(column) for column in (train.labels, train.pairs, train.groups))
    found: list[Float64[np.ndarray, " n"]] = []
    for draw in range(SHUFFLES):
        drawn = exchanged(labels, pairs, groups, seed=seed + draw).numpy()
        if 0 < drawn.sum() < len(drawn):
            found.append(clone(guard.probe).fit(states, drawn).decision_function(rows))
    return np.stack(found)
