"""Cosine to two centroids, averaged over layers: the guard of Zhao et al. 2025 (arXiv:2507.11878)."""

import numpy as np
from jaxtyping import Bool, Float64

from subspace_probe.core.errors import DataError
from subspace_probe.guard.methods.rules import Cosines, Settings, normal_slope


def fit(
    X: Float64[np.ndarray, "n f"],
    y: Bool[np.ndarray, " n"],
    nuisance: Float64[np.ndarray, " n"] | None,
    settings: Settings,
) -> Cosines:
    """Centroids of both classes at every layer; the threshold stays at 0, as published.

    Args:
        nuisance: 1 where the model refused, 0 where it did not. Centroids are then those of the paper: positives that
            were refused, negatives that were not. The slope comes from all rows.

    Raises:
        DataError: a nuisance other than 0 and 1, or no refused positive, or no negative that was not refused.
    """
    refused = _refused(nuisance, y)
    for cell, name in ((y & refused, "refused positive"), (~y & ~refused, "not refused negative")):
        if not cell.any():
            raise DataError(
                f"centroid_cosine was asked for the centroid of every {name} row, and there is none among {len(y)}. "
                "Add such rows, or leave out the nuisance."
            )
    means = np.stack([X[~y & ~refused].mean(axis=0), X[y & refused].mean(axis=0)])
    rule = Cosines(means.reshape(2, settings.n_layers, -1))
    return Cosines(rule.centroids, normal_slope(rule.decision(X), y))


def _refused(nuisance: Float64[np.ndarray, " n"] | None, y: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Without a nuisance all positives and all negatives count."""
    if nuisance is None:
        return y
    if odd := sorted(set(np.unique(nuisance)) - {0.0, 1.0}):
        raise DataError(f"centroid_cosine reads a nuisance as refused (1) or not (0); it was given {odd[0]:g} as well.")
    return nuisance == 1
