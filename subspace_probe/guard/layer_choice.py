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
        auroc: mean over folds.
        error: its standard error over folds.
    """

    auroc: float
    error: float


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
    """AUROC on held-out folds that share no group with the rest, by layer.

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
        held_out: list[float] = []
        for train, test in parts:
            if len(np.unique(y[train])) < 2 or len(np.unique(y[test])) < 2:
                continue  # a fold whose groups happen to be of one class says nothing
            fitted = cast("LatentProbe", clone(probe)).fit(
                rows[train], y[train], nuisance=None if nuisance is None else nuisance[train]
            )
            held_out.append(float(roc_auc_score(y[test], fitted.decision_function(rows[test]))))
        if not held_out:
            raise DataError("No fold has prompts of both classes, so layers cannot be compared. Say which to read.")
        error = float(np.std(held_out, ddof=1) / np.sqrt(len(held_out))) if len(held_out) > 1 else 0.0
        found[layer] = LayerScore(float(np.mean(held_out)), error)
        progress()
    return found


def chosen_layer(scores: Mapping[int, LayerScore]) -> int:
    """The shallowest layer within one standard error of the best (Breiman et al. 1984, section 3.4.3).

    A pass that ends earlier costs less. And the deeper a layer, the more of what it holds is what the model will do,
    which goes with the label on the prompts a guard is fitted on and not under framings: choosing by the separation of
    the classes, which goes on growing where the AUROC is 1, prefers just those layers.
    """
    best = max(scores.values(), key=lambda score: score.auroc)
    return min(layer for layer, score in scores.items() if score.auroc >= best.auroc - best.error)
