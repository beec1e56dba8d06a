"""The difference of the class means."""

import numpy as np
from jaxtyping import Bool, Float64

from subspace_probe.guard.methods.rules import Linear, Settings, between_means


def fit(X: Float64[np.ndarray, "n f"], y: Bool[np.ndarray, " n"], nuisance: None, settings: Settings) -> Linear:
    """`w = mean of y - mean of not y`; the decision is `w . (x - midpoint of the means)`."""
    return between_means(X[y].mean(axis=0) - X[~y].mean(axis=0), X, y)
