"""Separation by rank: the area under the ROC curve and its bootstrap interval.

Not a classifier and no thresholds: only whether scores order the two classes.
Background: Hanley & McNeil 1982, https://doi.org/10.1148/radiology.143.1.7063747.
"""

# torch leaves parts of itself untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspace_probe.linalg.resampling import cluster_index, cluster_weights, percentile_interval


def auroc(scores: Float[Tensor, " n"], labels: Int[Tensor, " n"] | Bool[Tensor, " n"]) -> float:
    """Probability that a random positive scores above a random negative, ties counting one half (Mann-Whitney U / PN).

    Args:
        scores: `[n]`, higher meaning positive.
        labels: `[n]`, 1 or True positive, 0 or False negative.

    Raises:
        ValueError: If a score is nan, a label is neither 0 nor 1, or one class is absent.

    >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
    0.875
    """
    rank, positive = _ranks("auroc", scores, labels)
    return float(_weighted_auroc(rank, positive, torch.ones(1, len(rank), dtype=torch.float64)))


def auroc_interval(
    scores: Float[Tensor, " n"],
    labels: Int[Tensor, " n"] | Bool[Tensor, " n"],
    *,
    clusters: Int[Tensor, " n"] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int,
) -> tuple[float, float, float]:
    """Percentile bootstrap interval of the AUROC, over rows or over clusters of rows.

    Draws that happen to hold one class only are left out. Perfect separation gives an interval of no width: it says
    nothing about how close to perfect the population is.

    Returns:
        `(estimate, low, high)`.

    Raises:
        ValueError: As `auroc`, or if there are fewer than two clusters, or more than a tenth of the draws hold
            one class only (there are two clusters or fewer of it).
    """
    rank, positive = _ranks("auroc_interval", scores, labels)
    members = cluster_index("auroc_interval", len(rank), clusters)
    count = int(members.max()) + 1
    blocks = cluster_weights(count, draws, seed=seed, width=len(rank))
    drawn = torch.cat([_weighted_auroc(rank, positive, weights[:, members]) for weights in blocks])
    defined = drawn[~drawn.isnan()]
    if len(defined) < 0.9 * draws:
        raise ValueError(
            f"auroc_interval drew {draws} samples of {count} clusters; {draws - len(defined)} hold one class only. "
            "Add clusters of the rarer class."
        )
    estimate = float(_weighted_auroc(rank, positive, torch.ones(1, len(rank), dtype=torch.float64)))
    return (estimate, *percentile_interval(defined, level))


def _ranks(asked: str, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Dense ranks of the scores, equal for ties, and the mask of positives."""
    work, marks = scores.detach().cpu(), labels.detach().cpu().long()
    nans, strange = int(work.isnan().sum()), sorted(set(marks.tolist()) - {0, 1})
    if len(work) != len(marks) or nans or strange or len(set(marks.tolist())) < 2:
        raise ValueError(
            f"{asked} needs one finite score and one label 0 or 1 per row, and both labels; found {len(work)} scores "
            f"({nans} nan) and {len(marks)} labels with values {sorted(set(marks.tolist()))}. Select two classes."
        )
    return torch.unique(work, return_inverse=True)[1], marks == 1


def _weighted_auroc(rank: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """AUROC under each row of `weights [draws n]`; nan where a class has no weight."""
    empty = torch.zeros(len(weights), int(rank.max()) + 1, dtype=torch.float64)
    hits = empty.index_add(1, rank[positive], weights[:, positive])
    misses = empty.index_add(1, rank[~positive], weights[:, ~positive])
    below = misses.cumsum(dim=1) - misses / 2
    return (hits * below).sum(dim=1) / (hits.sum(dim=1) * misses.sum(dim=1))
