"""Linear discriminant analysis with a shrunk covariance."""

import numpy as np
from jaxtyping import Bool, Float64

from subspace_probe.guard.methods.rules import Linear, Settings


def fit(X: Float64[np.ndarray, "n f"], y: Bool[np.ndarray, " n"], nuisance: None, settings: Settings) -> Linear:
    """Normal classes with one covariance, by scikit-learn; the decision is the log-odds, at the training base rate.

    `shrinkage` is scikit-learn's: `"auto"` (Ledoit-Wolf), a number in [0, 1], or None.

    Raises:
        ValueError: another `shrinkage`.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=settings.shrinkage).fit(X, y)
    return Linear(np.ascontiguousarray(model.coef_[0]), float(model.intercept_[0]))
