"""A threshold whose false-positive rate can be stated: order statistics of the scores of negatives.

For scores without ties, the false-positive rate of the k-th smallest of n scores, flagged strictly above, follows
Beta(n + 1 - k, k) whatever the scores' own distribution (Wilks 1941, https://doi.org/10.1214/aoms/1177731788). Two
rules follow: one whose rate is at most the target on average, and one whose rate is at most the target with a stated
confidence, which is where the Clopper-Pearson bound on what lies above it is at most the target. An interpolated
quantile has neither property.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.linalg.resampling import clopper_pearson

LEVEL = 0.95
"""Of the bound that is printed where the threshold was set to hold on average only."""


@final
@dataclass(frozen=True)
class Threshold:
    """A threshold and what it promises.

    Attributes:
        value: scores strictly above it are flagged. It lies `tolerance` above the order statistic, so that a negative
            whose score it rests on is not flagged because another batch gave its score another last digit.
        target_fpr: the false-positive rate asked for.
        confidence: with which the rate is at most the target; None where it is on average.
        n: negatives it rests on, or groups of them.
        grouped: whether n counts groups: then the rate is the share of groups with a prompt that is flagged, which is
            never below the mean over groups of the share of prompts.
        false_positives: how many of the n lie above it.
        bound: upper bound of the rate, at `confidence` (at 0.95 where that is None).
        tolerance: what scores of one prompt may differ by.
        fingerprint: of the model that the negatives were read from, for which the promise holds.
        marked: prompts among them that said which part of their message is the instruction. What arrives without is
            read at the end of the message, where the rate is another.
    """

    value: float
    target_fpr: float
    confidence: float | None
    n: int
    grouped: bool
    false_positives: int
    bound: float
    tolerance: float = 0.0
    fingerprint: str = ""
    marked: int = 0

    @property
    def level(self) -> float:
        """Of the bound."""
        return LEVEL if self.confidence is None else self.confidence

    def __str__(self) -> str:
        unit = "groups of negatives" if self.grouped else "negatives"
        rate = "share of groups with a false positive" if self.grouped else "FPR"
        held = "on average" if self.confidence is None else f"with confidence {self.confidence:g}"
        return (
            f"flags above {self.value:.4g}: {rate} <= {self.target_fpr:g} {held}; {self.false_positives} of {self.n} "
            f"{unit} flagged, at most {self.bound:.3g} at {self.level:g}"
        )


def needed(target_fpr: float, confidence: float | None) -> int:
    """The fewest negatives that a threshold for this rate can be set on: with none of them flagged.

    Raises:
        ConfigError: a rate or a confidence that cannot be.
    """
    _check(target_fpr, confidence)
    if confidence is None:
        return math.ceil(1 / target_fpr - 1e-9) - 1 or 1
    return math.ceil(math.log1p(-confidence) / math.log1p(-target_fpr) - 1e-9)


def allowed(n: int, target_fpr: float, confidence: float | None) -> int:
    """How many of n negatives may lie above the threshold; -1 where n are too few."""
    if n < needed(target_fpr, confidence):
        return -1
    if confidence is None:  # k = ceil((n + 1)(1 - a)): the mean of Beta(n + 1 - k, k) is at most a
        return n - math.ceil((n + 1) * (1 - target_fpr) - 1e-9)
    low, high = 0, n - 1  # the bound grows with the count: the largest count that it allows, by bisection
    while low < high:
        middle = (low + high + 1) // 2
        if _bound(middle, n, confidence) <= target_fpr:
            low = middle
        else:
            high = middle - 1
    return low


def threshold_at(
    scores: NDArray[np.float64] | Sequence[float],
    *,
    target_fpr: float = 0.01,
    confidence: float | None = 0.95,
    groups: Sequence[int] | NDArray[np.integer] | None = None,
    tolerance: float = 0.0,
) -> Threshold:
    """The lowest threshold that these scores of negatives allow at a false-positive rate.

    Args:
        scores: of negatives that nothing was fitted, chosen or calibrated on, shape [n].
        target_fpr: the largest rate.
        confidence: with which the rate is at most that; None: on average over such sets of negatives.
        groups: near-duplicates and common sources, shape [n]: each counts once, by its highest score.
        tolerance: what scores of one prompt may differ by; the threshold lies so much higher.

    Raises:
        ConfigError: a rate or a confidence that cannot be.
        DataError: too few negatives, with the number needed; scores that are not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise DataError(
            f"Scores of shape {values.shape} were given, or some are not finite. Give one number a negative."
        )
    if groups is not None:
        values = _by_group(values, np.asarray(groups))
    n, most = len(values), allowed(len(values), target_fpr, confidence)
    if most < 0:
        what = "groups of negatives" if groups is not None else "negatives"
        held = "on average" if confidence is None else f"with confidence {confidence:g}"
        raise DataError(
            f"A false-positive rate of {target_fpr:g} {held} was asked for on {n} {what}. It takes at least "
            f"{needed(target_fpr, confidence)}. Give more, or ask for a higher rate or a lower confidence."
        )
    value = float(np.sort(values)[n - most - 1]) + tolerance
    bound = _bound(most, n, LEVEL if confidence is None else confidence)
    flagged = int((values > value).sum())
    return Threshold(value, target_fpr, confidence, n, groups is not None, flagged, bound, tolerance)


def _by_group(values: NDArray[np.float64], groups: NDArray[np.integer]) -> NDArray[np.float64]:
    if len(groups) != len(values):
        raise DataError(f"{len(values)} scores came with {len(groups)} groups. Give one group a score.")
    names, index = np.unique(groups, return_inverse=True)
    highest = np.full(len(names), -np.inf)
    np.maximum.at(highest, index, values)
    return highest


def _bound(flagged: int, n: int, confidence: float) -> float:
    """One-sided Clopper-Pearson upper bound of a rate."""
    return clopper_pearson(flagged, n, level=2 * confidence - 1)[2]


def _check(target_fpr: float, confidence: float | None) -> None:
    if not 0 < target_fpr < 1:
        raise ConfigError(f"A false-positive rate of {target_fpr} was asked for. It lies between 0 and 1.")
    if confidence is not None and not 0.5 < confidence < 1:
        raise ConfigError(f"A confidence of {confidence} was asked for. It lies between 0.5 and 1, or is None.")
