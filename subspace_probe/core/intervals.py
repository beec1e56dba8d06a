"""Intervals of the kinds that findings carry; by group, so that near-duplicates do not count as evidence."""

# torch and scipy leave much untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Interval
from subspace_probe.linalg import ranking, resampling

FEW = 10
"""Fewer groups than this get Student's interval: a bootstrap of two prompts knows nothing of a third."""


def mean_of(values: Tensor, groups: Sequence[int] | Tensor, *, seed: int) -> tuple[float, Interval]:
    """Mean with its bootstrap interval by group; a rate of 0 or 1 gets Wilson's, which does not shrink to a point."""
    values, clusters = values.double(), torch.as_tensor(groups)
    n_clusters = len(clusters.unique())
    if n_clusters < 2:
        return float(values.mean()), Interval(float("nan"), float("nan"), of="one group only: no interval")
    lowest, highest = float(values.min()), float(values.max())
    if lowest == highest and lowest in (0.0, 1.0):
        _, low, high = resampling.wilson_interval(int(lowest) * n_clusters, n_clusters)
        return lowest, Interval(low, high, of=f"{n_clusters} groups of prompts, Wilson")
    if n_clusters < FEW:
        return _student(values, clusters)
    estimate, low, high = resampling.bootstrap_interval(values, clusters=clusters, seed=seed)
    return estimate, Interval(low, high, of=f"{n_clusters} groups of prompts, bootstrap")


def _student(values: Tensor, clusters: Tensor) -> tuple[float, Interval]:
    """Student's interval of the mean over groups, for so few that a bootstrap would be far too narrow."""
    _, index = clusters.unique(return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add(0, index, values)
    means = sums / torch.bincount(index)
    half = float(stats.t.ppf(0.975, len(means) - 1)) * float(means.std()) / len(means) ** 0.5
    estimate = float(values.mean())
    return estimate, Interval(estimate - half, estimate + half, of=f"{len(means)} groups of prompts, Student's t")


def auroc_of(scores: Tensor, labels: Tensor, groups: Tensor, *, seed: int) -> tuple[float, Interval]:
    """AUROC with its bootstrap interval by group.

    Perfect separation would get an interval of no width; it gets Wilson's lower bound for as many groups as the rarer
    class has. Too few groups of a class give no interval, and say so.
    """
    estimate = ranking.auroc(scores.double(), labels)
    rarer = min(len(groups[labels == label].unique()) for label in (0, 1))
    if estimate in (0.0, 1.0):
        _, low, high = resampling.wilson_interval(int(estimate) * rarer, rarer)
        return estimate, Interval(low, high, of=f"{rarer} groups of the rarer class, Wilson")
    try:
        _, low, high = ranking.auroc_interval(scores.double(), labels, clusters=groups, seed=seed)
    except ValueError:
        return estimate, Interval(float("nan"), float("nan"), of=f"only {rarer} groups of a class: no interval")
    return estimate, Interval(low, high, of="groups of prompts, bootstrap")


def range_of(draws: Tensor, of: str) -> Interval:
    """The range that one more draw of a null falls into with a probability of 95 %, by order statistics.

    39 draws are the fewest that can tell: with fewer the range is that of all of them, and its `level` says how little
    that is, so that no verdict rests on it.
    """
    values = draws.double().flatten().sort().values
    n = len(values)
    if not n:
        raise ConfigError("A null of no draws was asked for. Give 40 draws or more, or leave the check out.")
    out = max(1, int(0.025 * (n + 1)))
    level = max(0.0, (n + 1 - 2 * out) / (n + 1)) if n < 39 else 0.95
    return Interval(float(values[out - 1]), float(values[n - out]), level, of=of)


def shares(change: Float[Tensor, "... n"], gap: Float[Tensor, " n"]) -> Float[Tensor, "... n"]:
    """Per-prompt values whose mean is the ratio of means, change over gap; their spread is its own to first order."""
    ratio = change.mean(-1, keepdim=True) / gap.mean()
    return ratio + (change - ratio * gap) / gap.mean()
