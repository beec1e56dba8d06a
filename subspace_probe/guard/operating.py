"""Curves for drawing: what every threshold would do, of the guard and of what it is compared with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from subspace_probe.core.reports import Table
from subspace_probe.guard.ranked import Ranked

POINTS = 200


def operating_table(series: Mapping[str, Ranked]) -> Table:
    """Shares flagged at every threshold, or at 200 of them, denser where few negatives are."""
    rows: list[dict[str, Any]] = []
    for name, ranked in series.items():
        curve = ranked.curve()
        fpr, tpr, thresholds = curve.fpr[0], curve.tpr[0], np.append(np.inf, curve.thresholds)
        for point in _corners(fpr, tpr):
            place = {"fpr": float(fpr[point]), "tpr": float(tpr[point]), "threshold": float(thresholds[point])}
            rows.append({"series": name} | place)
    return Table.of(rows, "Prompts at or above the threshold are flagged; the highest flags none.")


def _corners(fpr: Any, tpr: Any) -> Int[np.ndarray, " points"]:
    """Points where the curve turns; between them it is straight, and nothing is lost by leaving them out."""
    across, up = np.diff(fpr) > 0, np.diff(tpr) > 0
    turns = np.flatnonzero((across[1:] != across[:-1]) | (up[1:] != up[:-1]) | (across[1:] & up[1:])) + 1
    points = np.unique(np.concatenate([[0], turns, [len(fpr) - 1]]))
    if len(points) <= POINTS:
        return points
    spaced = np.concatenate([np.geomspace(1, len(points), POINTS // 2), np.linspace(1, len(points), POINTS // 2)])
    return points[np.unique(spaced.round().astype(int)) - 1]
