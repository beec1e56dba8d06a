"""From scores to probabilities, by scikit-learn's calibrators, kept as plain numbers.

A calibration says what a score is worth on prompts like those it was fitted on, at their share of positives. It never
moves the threshold, which is on the score itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from subspace_probe.core.errors import DataError, unknown

Method = Literal["sigmoid", "isotonic", "temperature"]
FEW = 5
"""scikit-learn's calibrators want as many of each class."""


@final
@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted calibrator.

    Attributes:
        method: "sigmoid" (Platt 1999), "isotonic" (Zadrozny & Elkan 2002) or "temperature" (Guo et al. 2017).
        numbers: its parameters: `a, b` of 1 / (1 + exp(a f + b)); `x, y`, the corners of the step function; `beta`,
            the inverse temperature of the two logits -f and f.
    """

    method: Method
    numbers: Mapping[str, NDArray[np.float64]]

    @classmethod
    def fit(cls, scores: NDArray[np.float64], y: NDArray[np.int64], method: str) -> "Calibration":
        """Fit to the scores of prompts that the probe was not fitted on.

        Raises:
            UnknownName: no such method.
            DataError: fewer than five prompts of a class.
        """
        if method not in get_args(Method):
            raise unknown("calibration", method, get_args(Method))
        counts = np.bincount(y, minlength=2)
        if counts.min() < FEW:
            raise DataError(
                f"A calibration was asked for on {counts[1]} positive and {counts[0]} negative prompts. It takes "
                f"{FEW} of each at least, and about a thousand for isotonic."
            )
        frozen = FrozenEstimator(_Given().fit(scores[:, None], y))
        made: Any = CalibratedClassifierCV(frozen, method=method).fit(scores[:, None], y)
        (one,) = made.calibrated_classifiers_[0].calibrators
        if method == "sigmoid":
            numbers = {"a": np.array(one.a_), "b": np.array(one.b_)}
        elif method == "isotonic":
            numbers = {"x": one.X_thresholds_, "y": one.y_thresholds_}
        else:
            numbers = {"beta": np.array(one.beta_)}
        plain = {name: np.asarray(value, dtype=np.float64) for name, value in numbers.items()}
        return cls(method, plain)  # pyright: ignore[reportArgumentType]  (checked above)

    def __call__(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability of the positive class, shape [n]."""
        numbers = self.numbers
        if self.method == "sigmoid":
            return expit(-(numbers["a"] * scores + numbers["b"]))
        if self.method == "isotonic":
            return np.interp(scores, numbers["x"], numbers["y"])
        return expit(2 * numbers["beta"] * scores)


@final
class _Given(ClassifierMixin, BaseEstimator):
    """A classifier whose one column is the score itself: what calibrators want to be wrapped around."""

    def fit(self, X: NDArray[np.float64], y: NDArray[np.int64]) -> "_Given":
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        return X[:, 0]

    def predict(self, X: NDArray[np.float64]) -> NDArray[np.int64]:
        return self.classes_[(X[:, 0] > 0).astype(np.int64)]
