"""What a fitted method comes down to: a decision that is above zero for the second class, and how steep it is."""

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64

Tensors = dict[str, np.ndarray]


@runtime_checkable
class Settings(Protocol):
    """What a method may read: the parameters of `LatentProbe`."""

    n_layers: int
    C: float
    shrinkage: float | str | None
    random_state: int | None


@final
@dataclass(frozen=True, eq=False)
class Linear:
    """`x @ coef + intercept`.

    Attributes:
        coef: towards the second class, [f].
        intercept: what is added.
        slope: log-odds for one unit of the decision.
    """

    coef: Float64[np.ndarray, " f"]
    intercept: float
    slope: float = 1.0

    def decision(self, X: Float64[np.ndarray, "n f"]) -> Float64[np.ndarray, " n"]:
        """One number a row; above 0 is the second class."""
        return X @ self.coef + self.intercept

    def tensors(self) -> Tensors:
        """All there is to keep."""
        return {"coef": self.coef, "intercept": np.array([self.intercept]), "slope": np.array([self.slope])}

    @classmethod
    def of(cls, tensors: Tensors) -> "Linear":
        """The rule that `tensors` came from."""
        return cls(tensors["coef"], float(tensors["intercept"][0]), float(tensors["slope"][0]))


@final
@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosine to the second class's centroid minus cosine to the first's, the mean over layers.

    Zhao et al. 2025 (arXiv:2507.11878): the difference of two cosines, not the cosine to the difference.

    Attributes:
        centroids: of the first and the second class, [2, n_layers, d]; rows are n_layers blocks of d, in order.
        slope: log-odds for one unit of the decision.
    """

    centroids: Float64[np.ndarray, "2 n_layers d"]
    slope: float = 1.0

    def decision(self, X: Float64[np.ndarray, "n f"]) -> Float64[np.ndarray, " n"]:
        """One number a row, in [-2, 2]; above 0 is the second class. A zero vector has cosine 0 with everything."""
        blocks = X.reshape(len(X), *self.centroids.shape[1:])
        cosine = np.einsum("nld,cld->ncl", directions(blocks), directions(self.centroids))
        return (cosine[:, 1] - cosine[:, 0]).mean(axis=1)

    def tensors(self) -> Tensors:
        """All there is to keep."""
        return {"centroids": self.centroids, "slope": np.array([self.slope])}

    @classmethod
    def of(cls, tensors: Tensors) -> "Cosines":
        """The rule that `tensors` came from."""
        return cls(tensors["centroids"], float(tensors["slope"][0]))


Rule = Linear | Cosines


def rule_of(tensors: Tensors) -> Rule:
    """The rule, of whichever kind, that `tensors` came from."""
    return Cosines.of(tensors) if "centroids" in tensors else Linear.of(tensors)


def directions(x: Float64[np.ndarray, "*shape d"]) -> Float64[np.ndarray, "*shape d"]:
    """Rows of length one; a zero row stays zero."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)


def between_means(w: Float64[np.ndarray, " f"], X: Float64[np.ndarray, "n f"], y: Bool[np.ndarray, " n"]) -> Linear:
    """The rule along `w` with its zero halfway between the class means, and the slope of `normal_slope`."""
    intercept = -float(w @ (X[y].mean(axis=0) + X[~y].mean(axis=0))) / 2
    return Linear(w, intercept, normal_slope(X @ w + intercept, y))


def normal_slope(decision: Float64[np.ndarray, " n"], y: Bool[np.ndarray, " n"]) -> float:
    """Log-odds for one unit of a decision: gap of the class means over the pooled variance.

    That is the slope where both classes are normal with one variance. Finite however well the classes are separated:
    the standard deviation counts as at least a thousandth of the gap. Not negative: a decision that runs against its
    own labels says nothing (0).
    """
    gap = float(decision[y].mean() - decision[~y].mean())
    if not gap > 0:
        return 0.0
    squares = sum(float(((part - part.mean()) ** 2).sum()) for part in (decision[y], decision[~y]))
    return gap / max(squares / max(len(y) - 2, 1), (1e-3 * gap) ** 2)
