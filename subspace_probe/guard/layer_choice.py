"""Which layer a guard reads: by cross-validation on the prompts it is fitted on, and on no others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast, final

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from subspace_probe.core.errors import DataError
from subspace_probe.guard.probe import LatentProbe

FOLDS = 5


@final
@dataclass(frozen=True)
class LayerScore:
    """How well a layer tells the classes apart on folds it was not fitted on.

    Attributes:
        separation: difference of the classes' mean scores over their pooled standard deviation (d'), mean over folds.
            It goes on where the AUROC has reached 1.
        error: standard error of the separation over folds.
        auroc: mean over folds.
    """

    separation: float
    error: float
    auroc: float


def layer_scores(
    probe: LatentProbe,
    states: Mapping[int, NDArray[np.float64]],
    y: NDArray[np.int64],
    groups: NDArray[np.int64],
    nuisance: NDArray[np.float64] | None,
    *,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[int, LayerScore]:
    """Separation on held-out folds that share no group with the rest, by layer.

    Args:
        probe: cloned and fitted for every fold.
        states: by layer, shape [n, width].

    Raises:
        DataError: too few groups of a class for two folds.
    """
    smallest = min(len(np.unique(groups[y == label])) for label in (0, 1))
    folds = min(FOLDS, smallest)
    if folds < 2:
        raise DataError(
            f"Layers were to be chosen by cross-validation, but a class has {smallest} group of prompts. Give more, or "
            "say which layers to read."
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = list(splitter.split(y, y, groups))
    found: dict[int, LayerScore] = {}
    for layer, rows in states.items():
        held_out: list[tuple[float, float]] = []
        for train, test in parts:
            if len(np.unique(y[train])) < 2 or len(np.unique(y[test])) < 2:
                continue  # a fold whose groups happen to be of one class says nothing
            fitted = cast("LatentProbe", clone(probe)).fit(
                rows[train], y[train], nuisance=None if nuisance is None else nuisance[train]
            )
            scores = fitted.decision_function(rows[test])
            held_out.append((_separation(scores, y[test]), float(roc_auc_score(y[test], scores))))
        if not held_out:
            raise DataError("No fold has prompts of both classes, so layers cannot be compared. Say which to read.")
        separations, aurocs = np.array(held_out).T
        error = float(separations.std(ddof=1) / np.sqrt(len(held_out))) if len(held_out) > 1 else 0.0
        found[layer] = LayerScore(float(separations.mean()), error, float(aurocs.mean()))
        progress()
    return found


def chosen_layer(scores: Mapping[int, LayerScore]) -> int:
    """The shallowest layer within one standard error of the best (Breiman et al. 1984, section 3.4.3): a pass that
    ends earlier costs less."""
    best = max(scores.values(), key=lambda score: score.separation)
    return min(layer for layer, score in scores.items() if score.separation >= best.separation - best.error)


def _separation(scores: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    positive, negative = scores[y == 1], scores[y == 0]
    pooled = float(np.sqrt((positive.var() + negative.var()) / 2))
    difference = float(positive.mean() - negative.mean())
    return difference / pooled if pooled > 0 else 0.0
