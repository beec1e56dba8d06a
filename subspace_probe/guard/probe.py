"""A classifier on activations, with scikit-learn's conventions."""

from collections.abc import Callable
from typing import Any, TypeVar, final

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import ArrayLike
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from subspace_probe.core.errors import ConfigError, DataError, ShapeError
from subspace_probe.guard.methods import METHODS, TAKE_NUISANCE
from subspace_probe.guard.methods.rules import Cosines, Linear, Rule, Tensors, rule_of

_R = TypeVar("_R", Linear, Cosines)
_validate: Callable[..., Any] = validate_data  # scikit-learn ships no types, and guessed ones are wrong
_array: Callable[..., Any] = check_array


@final
class LatentProbe(ClassifierMixin, BaseEstimator):
    """Tells two classes apart by a model's activations.

    Args:
        method: `"lda"` (shrunk covariance), `"logistic"`, `"mean_difference"`, `"centroid_cosine"` (cosine to two
            centroids, averaged over layers) or `"factor"` (mean difference with a nuisance partialled out).
        n_layers: the columns of X are so many blocks of equal width, one a layer. Only `centroid_cosine` needs to know.
        C: inverse strength of the regularisation of `logistic`.
        shrinkage: of the covariance of `lda`: `"auto"` (Ledoit-Wolf), a number in [0, 1], or None.
        random_state: of methods that draw; at present none does.

    Attributes:
        classes_: the two labels, sorted; a decision above 0 means the second.
        n_features_in_: width of X.
        rule_: what was fitted.

    `lda` and `logistic` decide by their log-odds at the training base rate. The others decide by a distance whose slope
    is that of two normal classes of one variance and equal size (`rules.normal_slope`), on the training rows: with more
    features than rows those are further apart than new ones will be, and probabilities need calibration.
    """

    method: str
    n_layers: int
    C: float
    shrinkage: float | str | None
    random_state: int | None
    classes_: np.ndarray
    n_features_in_: int
    rule_: Rule

    # not annotated: scikit-learn wants parameters stored as given, and checked in fit
    def __init__(self, method="lda", *, n_layers=1, C=1.0, shrinkage="auto", random_state=0):
        self.method = method
        self.n_layers = n_layers
        self.C = C
        self.shrinkage = shrinkage
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, nuisance: ArrayLike | None = None) -> "LatentProbe":
        """Fit.

        Args:
            X: activations, [n, n_features].
            y: two labels of any kind, [n].
            nuisance: one number a row, [n]. `factor` partials it out; `centroid_cosine` reads it as "refused", 0 or 1,
                and takes its centroids from refused positives and not refused negatives. Other methods refuse it.

        Raises:
            ValueError: data that cannot be used: not finite, not two classes, widths that do not fit.
            ConfigError: no such method, or a setting that cannot be honoured.
        """
        fitting = METHODS.load(self.method)
        rows, labels = _validate(self, X, y, dtype=np.float64)
        positive = self._classes(labels)
        self._check_layers()
        self.rule_ = fitting(rows, positive, self._nuisance(nuisance, len(rows)), self)
        return self

    def decision_function(self, X: ArrayLike) -> Float64[np.ndarray, " n"]:
        """Above 0 means `classes_[1]`; [n]."""
        check_is_fitted(self, "rule_")
        return self.rule_.decision(_validate(self, X, dtype=np.float64, reset=False))

    def predict_proba(self, X: ArrayLike) -> Float64[np.ndarray, "n 2"]:
        """Probability of each class: the logistic function of `slope_` times the decision."""
        odds = self.decision_function(X) * self.slope_
        return np.stack([expit(-odds), expit(odds)], axis=1)

    def predict(self, X: ArrayLike) -> np.ndarray:
        """A label a row."""
        second = self.decision_function(X) > 0
        return self.classes_[second.astype(int)]

    @property
    def slope_(self) -> float:
        """Log-odds for one unit of the decision."""
        return self.rule_.slope

    @property
    def coef_(self) -> Float64[np.ndarray, "1 f"]:
        """Weights of a linear rule."""
        return self._rule(Linear, "coef_").coef[None]

    @property
    def intercept_(self) -> Float64[np.ndarray, " 1"]:
        """Intercept of a linear rule."""
        return np.array([self._rule(Linear, "intercept_").intercept])

    @property
    def centroids_(self) -> Float64[np.ndarray, "2 n_layers d"]:
        """Centroids of the first and the second class at every layer, of `centroid_cosine`."""
        return self._rule(Cosines, "centroids_").centroids

    def tensors(self) -> Tensors:
        """All that was learned, as arrays that need no pickle; `from_tensors` gives the same probe back.

        Labels that are strings become code points, [2, longest].
        """
        check_is_fitted(self, "rule_")
        return {**self.rule_.tensors(), **_labels(self.classes_), "n_features_in": np.array([self.n_features_in_])}

    @classmethod
    def from_tensors(cls, settings: dict[str, Any], tensors: Tensors) -> "LatentProbe":
        """The probe whose `get_params()` and `tensors()` these are."""
        probe = cls(**settings)
        probe.rule_ = rule_of(tensors)
        probe.classes_ = _from_labels(tensors)
        probe.n_features_in_ = int(tensors["n_features_in"][0])
        return probe

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _rule(self, kind: type[_R], name: str) -> _R:
        """As an attribute that is not there, where there is no rule or one of another kind."""
        if "rule_" in vars(self) and isinstance(self.rule_, kind):
            return self.rule_
        raise AttributeError(f"A LatentProbe with method={self.method!r} has no {name}, or none before it is fitted.")

    def _classes(self, y: np.ndarray) -> Bool[np.ndarray, " n"]:
        """Set `classes_`; which rows are of the second."""
        check_classification_targets(y)
        if (kind := type_of_target(y, input_name="y")) != "binary":
            # scikit-learn's own words: its checks look for them
            raise DataError(f"Only binary classification is supported. The type of the target is {kind}.")
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise DataError(f"Two classes are needed; y has one class only: {self.classes_[0]!r}. Add the other.")
        return y == self.classes_[1]

    def _check_layers(self) -> None:
        if not isinstance(self.n_layers, int | np.integer) or self.n_layers < 1:
            raise ConfigError(f"LatentProbe was given n_layers={self.n_layers!r}; a whole number from 1 is needed.")
        if self.n_features_in_ % self.n_layers:
            raise ShapeError(
                f"LatentProbe was told of {self.n_layers} layers of equal width, and given {self.n_features_in_} "
                "features, which do not divide into them. Set n_layers to the number of layers side by side in X."
            )

    def _nuisance(self, nuisance: ArrayLike | None, n: int) -> Float64[np.ndarray, " n"] | None:
        if nuisance is None:
            return None
        if self.method not in TAKE_NUISANCE:
            raise ConfigError(
                f"{self.method} was given a nuisance, which it cannot use. "
                f"Methods that can: {', '.join(TAKE_NUISANCE)}."
            )
        values = _array(nuisance, dtype=np.float64, ensure_2d=False, input_name="nuisance")
        if values.shape != (n,):
            raise ShapeError(f"nuisance must be one number a row, [{n}]; it has shape {list(values.shape)}.")
        return values


def _labels(classes: np.ndarray) -> Tensors:
    """Two labels as numbers."""
    if classes.dtype.kind in "biuf":
        return {"classes": classes}
    text = classes.astype("U")
    return {"classes_utf32": text.view(np.uint32).reshape(len(text), -1)}


def _from_labels(tensors: Tensors) -> np.ndarray:
    if "classes" in tensors:
        return tensors["classes"]
    points = np.ascontiguousarray(tensors["classes_utf32"])
    return points.view(f"U{points.shape[1]}")[:, 0]
