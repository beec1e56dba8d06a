"""The ROC and precision-recall curves of scores, for any number of weightings of the prompts at once.

One cumulative sum over the sorted scores gives every figure that is read off a curve; a bootstrap draw is a weighting.
"""

from typing import final

import numpy as np
from jaxtyping import Bool, Float64, Int

from subspace_probe.core.errors import DataError


@final
class Curves:
    """What is flagged, rightly and wrongly, when everything from a score upwards is.

    Args:
        scores: higher meaning positive, shape [n].
        y: 1 or True for positive, shape [n].
        weights: of the prompts, a row for each curve, shape [curves, n]; one curve of equal weights without them.

    Attributes:
        thresholds: the distinct scores, highest first, shape [t]; prompts at or above one are flagged.
        hits: weight of the flagged positives, shape [curves, t + 1]; 0 in the first column.
        alarms: weight of the flagged negatives, likewise.

    Raises:
        DataError: scores that are not finite, or labels of one class.
    """

    def __init__(
        self,
        scores: Float64[np.ndarray, " n"],
        y: Bool[np.ndarray, " n"] | Int[np.ndarray, " n"],
        weights: Float64[np.ndarray, "curves n"] | None = None,
    ) -> None:
        positive = y.astype(bool)
        if len(scores) != len(y) or not np.isfinite(scores).all() or positive.all() or not positive.any():
            raise DataError(
                f"A curve was asked for of {len(scores)} scores, {int((~np.isfinite(scores)).sum())} of them not "
                f"finite, with {int(positive.sum())} positive and {int((~positive).sum())} negative labels. Give one "
                "finite score a prompt, and prompts of both classes."
            )
        weights = np.ones((1, len(scores))) if weights is None else weights
        order = np.argsort(-scores, kind="stable")
        falling = scores[order]
        last = np.append(np.flatnonzero(np.diff(falling)), len(scores) - 1)  # of each run of ties
        self.thresholds: Float64[np.ndarray, " t"] = falling[last]
        sorted_weights, sorted_positive = weights[:, order], positive[order]
        self.hits = _cumulated(sorted_weights * sorted_positive, last)
        self.alarms = _cumulated(sorted_weights * ~sorted_positive, last)

    @property
    def tpr(self) -> Float64[np.ndarray, "curves points"]:
        """Share of positives flagged."""
        return self.hits / self.hits[:, -1:]

    @property
    def fpr(self) -> Float64[np.ndarray, "curves points"]:
        """Share of negatives flagged."""
        return self.alarms / self.alarms[:, -1:]

    def auroc(self) -> Float64[np.ndarray, " curves"]:
        """Area under the ROC curve; ties count one half. Exactly 1 where the classes are apart."""
        area = (np.diff(self.alarms) * (self.hits[:, 1:] + self.hits[:, :-1])).sum(axis=1) / 2
        return area / (self.hits[:, -1] * self.alarms[:, -1])

    def average_precision(self) -> Float64[np.ndarray, " curves"]:
        """Area under the precision-recall curve as a sum of steps, as scikit-learn has it: no interpolation."""
        flagged = np.maximum(self.hits + self.alarms, np.finfo(np.float64).tiny)
        return (np.diff(self.hits) * (self.hits / flagged)[:, 1:]).sum(axis=1) / self.hits[:, -1]

    def tpr_at(self, fpr: float) -> Float64[np.ndarray, " curves"]:
        """The largest share of positives that a threshold flags without flagging more than this share of negatives."""
        return np.where(self.fpr <= fpr + 1e-12, self.tpr, 0.0).max(axis=1)

    def best_f1(self) -> Float64[np.ndarray, " curves"]:
        """The largest F1 of any threshold: chosen on the very prompts it is measured on, so optimistic."""
        return (2 * self.hits / (self.hits + self.alarms + self.hits[:, -1:])).max(axis=1)


def _cumulated(
    weights: Float64[np.ndarray, "curves n"], last: Int[np.ndarray, " t"]
) -> Float64[np.ndarray, "curves p"]:
    sums = np.cumsum(weights, axis=1)[:, last]
    return np.concatenate([np.zeros((len(sums), 1)), sums], axis=1)
