"""Linear discriminant analysis with a shrunk covariance."""

import numpy as np
from jaxtyping import Bool, Float64
from scipy.linalg import solve
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.preprocessing import StandardScaler

from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.guard.methods.rules import Linear, Settings


def fit(X: Float64[np.ndarray, "n f"], y: Bool[np.ndarray, " n"], nuisance: None, settings: Settings) -> Linear:
    """Normal classes with one covariance, as scikit-learn fits them; the decision is the log-odds.

    The base rate is that of the training rows. `shrinkage` is scikit-learn's, by class: `"auto"` (Ledoit-Wolf, on
    standardised features), a number in [0, 1], or None.

    Raises:
        ConfigError: another `shrinkage`.
        DataError: a class with fewer than two rows, which has no covariance.
    """
    if (least := min(int(y.sum()), int((~y).sum()))) < 2:
        raise DataError(f"lda needs two rows of each class; one class has {least}. Add rows, or use mean_difference.")
    amount = settings.shrinkage
    if not (amount is None or amount == "auto" or (not isinstance(amount, str) and 0 <= amount <= 1)):
        raise ConfigError(f"lda was given shrinkage={amount!r}; it takes 'auto', a number from 0 to 1, or None.")
    if X.shape[1] > len(X):
        diagonal, rows = _covariance(X, y, amount)
        if (diagonal > 0).all():
            return _wide(X, y, diagonal, rows)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=amount).fit(X, y)
    return Linear(np.ascontiguousarray(model.coef_[0]), float(np.asarray(model.intercept_)[0]))


def _covariance(
    X: Float64[np.ndarray, "n f"], y: Bool[np.ndarray, " n"], amount: float | str | None
) -> tuple[Float64[np.ndarray, " f"], Float64[np.ndarray, "n f"]]:
    """scikit-learn's covariance as `diag(diagonal) + rows.T @ rows`, never formed."""
    diagonal, parts = np.zeros(X.shape[1]), []
    for part in (X[~y], X[y]):
        scale = np.asarray(StandardScaler().fit(part).scale_) if amount == "auto" else np.ones(X.shape[1])
        centred = part - part.mean(axis=0)
        gram = (centred / scale) @ (centred / scale).T / len(part)
        weight = _ledoit_wolf(gram, X.shape[1]) if amount == "auto" else float(amount or 0)
        diagonal += len(part) / len(X) * weight * np.trace(gram) / X.shape[1] * scale**2
        parts.append(centred * np.sqrt((1 - weight) / len(X)))
    return diagonal, np.concatenate(parts)


def _ledoit_wolf(gram: Float64[np.ndarray, "n n"], width: int) -> float:
    """The amount of shrinkage, of Ledoit and Wolf 2004, from the products of n centred rows, over n.

    Equal to `sklearn.covariance.ledoit_wolf_shrinkage` of the rows, whose sums over pairs of features are sums over
    pairs of rows here.
    """
    n = len(gram)
    squares = float((gram**2).sum())
    spread = squares - float(np.trace(gram)) ** 2 / width
    noise = float((np.diag(gram) ** 2).sum()) - squares / n
    return min(noise / spread, 1.0) if noise > 0 and spread > 0 else 0.0


def _wide(
    X: Float64[np.ndarray, "n f"],
    y: Bool[np.ndarray, " n"],
    diagonal: Float64[np.ndarray, " f"],
    rows: Float64[np.ndarray, "n f"],
) -> Linear:
    """The same solution by Woodbury's identity: n^2 f operations and n f numbers instead of f^3 and f^2."""
    high, low = X[y].mean(axis=0), X[~y].mean(axis=0)
    plain = (high - low) / diagonal
    inner = np.eye(len(rows)) + (rows / diagonal) @ rows.T
    coef = plain - (rows.T @ solve(inner, rows @ plain, assume_a="pos")) / diagonal
    return Linear(coef, float(np.log(y.sum() / (~y).sum()) - coef @ (high + low) / 2))
