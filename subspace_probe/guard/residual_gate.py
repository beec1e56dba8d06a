"""Is a state like the benign ones at all? What a few principal components leave over, with a limit."""

from collections.abc import Callable
from math import ceil
from typing import Any, final

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.model_selection import GroupKFold
from sklearn.utils.validation import check_is_fitted, validate_data

from subspace_probe.core.errors import ConfigError

FOLDS = 10
_validate: Callable[..., Any] = validate_data  # scikit-learn ships no types, and guessed ones are wrong


@final
class ResidualGate(OutlierMixin, BaseEstimator):
    """Flags states that the principal components of benign states do not span.

    The residual of a state is the norm of what the components leave over (Jackson and Mudholkar 1979, there Q). It says
    that a state is unlike benign ones, not that it is harmful: a guard may abstain on it, never decide.

    The limit comes from residuals of rows that were left out of the components, in ten folds: residuals of the rows
    they were fitted on are too small, the more so the fewer rows there are to a feature. Components of nine tenths of
    the rows fit a little worse than those of all, so the realised rate is at or below the one asked for.

    Args:
        variance: share of the benign variance that the components keep, in (0, 1]. One direction is left over at least.
        alarm_rate: share of benign states allowed beyond the limit, in (0, 1).
        random_state: of the folds.

    Attributes:
        mean_: of the benign states, [f].
        components_: orthonormal, [k, f].
        limit_: the largest residual that is inside.
        alarm_rate_: what the limit holds to, on average: `alarm_rate` or just below; more where there are fewer than
            1 / alarm_rate - 1 rows, and the limit is the largest residual seen.
        offset_: -limit_, as scikit-learn names it.
        n_features_in_: width of X.
    """

    variance: float
    alarm_rate: float
    random_state: int | None
    mean_: Float64[np.ndarray, " f"]
    components_: Float64[np.ndarray, "k f"]
    limit_: float
    alarm_rate_: float
    n_features_in_: int

    # not annotated: scikit-learn wants parameters stored as given, and checked in fit
    def __init__(self, variance=0.99, *, alarm_rate=0.01, random_state=0):
        self.variance = variance
        self.alarm_rate = alarm_rate
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None, groups: ArrayLike | None = None) -> "ResidualGate":
        """Fit on benign states, [n, n_features]; y is not read.

        Args:
            groups: rows of one source carry the same number, [n]; a fold holds all of them.

        Raises:
            ConfigError: a setting outside its range.
            ValueError: fewer than two rows, or non-finite ones.
        """
        if not (0 < self.variance <= 1 and 0 < self.alarm_rate < 1):
            raise ConfigError(
                f"ResidualGate was given variance={self.variance!r}, alarm_rate={self.alarm_rate!r}; the first lies in "
                "(0, 1], the second in (0, 1)."
            )
        rows = _validate(self, X, dtype=np.float64, ensure_min_samples=2)
        n = len(rows)
        held_out = np.empty(n)
        sources = np.arange(n) if groups is None else np.asarray(groups)
        if (count := len(np.unique(sources))) < 2:
            sources, count = np.arange(n), n  # one source cannot be left out of itself
        folds = GroupKFold(min(FOLDS, count), shuffle=True, random_state=self.random_state)
        for rest, fold in folds.split(rows, groups=sources):
            held_out[fold] = _residual(rows[fold], *_components(rows[rest], self.variance))
        rank = min(ceil((n + 1) * (1 - self.alarm_rate) - 1e-9), n)
        # where nothing is left over, residuals are rounding, and one rounding is no larger than another
        rounding = 1e3 * np.finfo(np.float64).eps * float(np.linalg.norm(rows, axis=1).max())
        self.limit_ = max(float(np.sort(held_out)[rank - 1]), rounding)
        self.alarm_rate_ = (n + 1 - rank) / (n + 1)
        self.mean_, self.components_ = _components(rows, self.variance)
        return self

    @property
    def offset_(self) -> float:
        """`score_samples` at the limit."""
        return -self.limit_

    def score_samples(self, X: ArrayLike) -> Float64[np.ndarray, " n"]:
        """Minus the residual, in the units of X; [n]."""
        check_is_fitted(self, "components_")
        rows = _validate(self, X, dtype=np.float64, reset=False)
        return -_residual(rows, self.mean_, self.components_)

    def decision_function(self, X: ArrayLike) -> Float64[np.ndarray, " n"]:
        """What is left to the limit: negative outside; [n]."""
        return self.score_samples(X) + self.limit_

    def predict(self, X: ArrayLike) -> Int[np.ndarray, " n"]:
        """1 inside, -1 outside."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def tensors(self) -> dict[str, np.ndarray]:
        """All that was learned, as arrays that need no pickle; `from_tensors` gives the same gate back."""
        check_is_fitted(self, "components_")
        return {
            "mean": self.mean_,
            "components": self.components_,
            "limit": np.array([self.limit_]),
            "alarm_rate": np.array([self.alarm_rate_]),
        }

    @classmethod
    def from_tensors(cls, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> "ResidualGate":
        """The gate whose `get_params()` and `tensors()` these are."""
        gate = cls(**settings)
        gate.mean_, gate.components_ = tensors["mean"], tensors["components"]
        gate.limit_, gate.alarm_rate_ = float(tensors["limit"][0]), float(tensors["alarm_rate"][0])
        gate.n_features_in_ = len(gate.mean_)
        return gate


def _components(
    rows: Float64[np.ndarray, "n f"], variance: float
) -> tuple[Float64[np.ndarray, " f"], Float64[np.ndarray, "k f"]]:
    """The mean, and the fewest principal components that keep `variance`; one direction is left over."""
    mean = rows.mean(axis=0)
    _, lengths, frame = np.linalg.svd(rows - mean, full_matrices=False)
    kept = np.cumsum(lengths**2)
    if kept[-1] == 0:
        return mean, frame[:0]
    fewest = int(np.searchsorted(kept, variance * kept[-1])) + 1
    # a copy: a view would keep, and save, all of the frame
    return mean, frame[: min(fewest, rows.shape[1] - 1)].copy()


def _residual(
    rows: Float64[np.ndarray, "n f"], mean: Float64[np.ndarray, " f"], components: Float64[np.ndarray, "k f"]
) -> Float64[np.ndarray, " n"]:
    """Norm of what the components leave over."""
    centred = rows - mean
    return np.linalg.norm(centred - (centred @ components.T) @ components, axis=1)
