"""The class direction with a nuisance partialled out: harmfulness at a fixed refusal."""

import numpy as np
from jaxtyping import Bool, Float64

from subspace_probe.core.errors import DataError
from subspace_probe.guard.methods import mean_difference
from subspace_probe.guard.methods.rules import Linear, Settings, between_means


def fit(
    X: Float64[np.ndarray, "n f"],
    y: Bool[np.ndarray, " n"],
    nuisance: Float64[np.ndarray, " n"] | None,
    settings: Settings,
) -> Linear:
    """Least squares of X on [1, y, nuisance]: the coefficient of y, less its part along the nuisance's.

    Orthogonal in the plain metric, so that regressing the decision on [1, y, nuisance] gives the nuisance exactly
    nothing: its mean changes with y alone. Without a nuisance it is `mean_difference`.

    Args:
        nuisance: one number a row, such as whether the model refused.

    Raises:
        DataError: a nuisance that is constant or follows from y, or nothing of y's direction left beside it.
    """
    if nuisance is None:
        return mean_difference.fit(X, y, None, settings)
    design = np.stack([y.astype(np.float64), nuisance], axis=1)
    design = design - design.mean(axis=0)
    if np.linalg.matrix_rank(design / np.linalg.norm(design, axis=0).clip(1e-300), tol=1e-6) < 2:
        raise DataError(
            "factor was asked to tell the classes from a nuisance that is constant or follows from them. Add rows "
            "where the two disagree, or leave out the nuisance."
        )
    effect, other = np.linalg.lstsq(design, X - X.mean(axis=0), rcond=None)[0]
    unit = other / max(float(np.linalg.norm(other)), 1e-300)
    w = effect - (effect @ unit) * unit
    w = w - (w @ unit) * unit  # once more, for what rounding left
    if np.linalg.norm(w) <= 1e-9 * np.linalg.norm(effect):
        raise DataError(
            f"factor found the classes and the nuisance along one direction of {X.shape[1]} features: nothing is left "
            "to decide by. Use more features, or leave out the nuisance."
        )
    return between_means(w, X, y)
