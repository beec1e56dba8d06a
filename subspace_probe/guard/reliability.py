"""Whether probabilities mean what they say: bins of equal mass, expected calibration error, Brier score."""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Float64, Int

BINS = 15


@final
@dataclass(frozen=True, eq=False)
class Bins:
    """Prompts in bins of equal mass by probability, so that none is empty (Nixon et al. 2019, arXiv:1904.01685).

    Attributes:
        index: the bin of each prompt, shape [n]. Equal probabilities share a bin, so there may be fewer than asked for.
        count: bins that hold a prompt.
    """

    index: Int[np.ndarray, " n"]
    count: int

    @classmethod
    def of(cls, probabilities: Float64[np.ndarray, " n"], bins: int = BINS) -> "Bins":
        """Bins by rank."""
        n = len(probabilities)
        rising = np.sort(probabilities)
        ends = [np.searchsorted(rising, probabilities, side=side) for side in ("left", "right")]
        middle = (ends[0] + ends[1] - 1) // 2  # ties go where the middle one of them falls
        _, index = np.unique(middle * min(bins, n) // n, return_inverse=True)
        return cls(index, int(index.max()) + 1)

    def sums(self, values: Float64[np.ndarray, "draws n"]) -> Float64[np.ndarray, "draws bins"]:
        """Totals in each bin."""
        member = np.eye(self.count)[self.index]
        return values @ member


def expected_calibration_error(
    probabilities: Float64[np.ndarray, " n"],
    y: Bool[np.ndarray, " n"],
    bins: Bins,
    weights: Float64[np.ndarray, "draws n"] | None = None,
) -> Float64[np.ndarray, " draws"]:
    """Mean over prompts of |share of positives in the prompt's bin - mean probability there|."""
    weights = np.ones((1, len(y))) if weights is None else weights
    off = np.abs(bins.sums(weights * (y.astype(np.float64) - probabilities)))
    return off.sum(axis=1) / weights.sum(axis=1)


def calibrated_errors(
    probabilities: Float64[np.ndarray, " n"], bins: Bins, *, draws: int, seed: int
) -> Float64[np.ndarray, " draws"]:
    """The error that this many prompts show of probabilities that are exactly right, by drawing labels from them.

    Binning a finite sample gives an error above 0 even then (Broecker & Smith 2007, consistency resampling).
    """
    rng = np.random.default_rng(seed)
    labels = rng.random((draws, len(probabilities))) < probabilities
    return np.abs(bins.sums(labels - probabilities)).sum(axis=1) / len(probabilities)


def brier(
    probabilities: Float64[np.ndarray, " n"],
    y: Bool[np.ndarray, " n"],
    weights: Float64[np.ndarray, "draws n"] | None = None,
) -> Float64[np.ndarray, " draws"]:
    """Mean squared distance of probabilities from what happened (Brier 1950)."""
    weights = np.ones((1, len(y))) if weights is None else weights
    return weights @ (probabilities - y) ** 2 / weights.sum(axis=1)
