"""L2-regularised logistic regression."""

import numpy as np
from jaxtyping import Bool, Float64
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from subspace_probe.guard.methods.rules import Linear, Settings


def fit(X: Float64[np.ndarray, "n f"], y: Bool[np.ndarray, " n"], nuisance: None, settings: Settings) -> Linear:
    """Logistic regression on standardised features (scikit-learn, lbfgs), mapped back to raw units.

    The decision is the log-odds, at the training base rate. A feature that is the same in every row gets weight 0.

    Raises:
        ValueError: `C` not above 0.
    """
    scaler = StandardScaler().fit(X)
    model = LogisticRegression(C=settings.C, max_iter=10_000, random_state=settings.random_state)
    model.fit(scaler.transform(X), y)
    coef = model.coef_[0] / scaler.scale_
    return Linear(coef, float(np.asarray(model.intercept_)[0] - scaler.mean_ @ coef))
