"""Lines with the band of their interval: what layer curves and dose-response curves are made of."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from subspace_probe.figures.rows import Row, drawn, finite
from subspace_probe.figures.theme import Place, translucent


def banded(
    figure: go.Figure,
    place: Place,
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    name: str,
    colour: str,
    hover: str,
    **line: Any,
) -> None:
    """Add one line and the band between its columns `low` and `high`.

    Args:
        figure: the figure to add to.
        place: row and column of the panel.
        rows: the points, in any order.
        x: the column across.
        y: the column upwards.
        name: of the series, for hover texts.
        colour: of the line; the band takes it thinned.
        hover: the hover text of a point; `customdata` is low and high.
        line: further properties of the line, such as `dash`.
    """
    points = sorted(rows, key=lambda row: row[x])
    row, col = place
    corners: list[tuple[float | None, float | None]] = []
    for known, run in groupby(points, key=lambda p: bool(drawn([p], "low", "high"))):
        if known:  # one outline for each run of points, so that a gap in the line is a gap in the band
            part = list(run)
            corners += [*((p[x], p["high"]) for p in part), *((p[x], p["low"]) for p in reversed(part)), (None, None)]
    figure.add_scatter(
        x=[across for across, _ in corners],
        y=[up for _, up in corners],
        fill="toself",
        fillcolor=translucent(colour, 0.16),
        line={"width": 1, "color": translucent(colour, 0.3)},  # a lone point's band is this line
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        name=f"{name}, interval",
        row=row,
        col=col,
    )
    figure.add_scatter(
        x=[p[x] for p in points],
        y=[finite(p[y]) for p in points],
        mode="lines+markers",
        name=name,
        customdata=[[finite(p["low"]), finite(p["high"])] for p in points],
        hovertemplate=hover,
        line={"color": colour, "width": 2.5, **line},
        marker={"size": 6, "color": colour},
        row=row,
        col=col,
    )


def last(rows: Sequence[Row], x: str, y: str) -> tuple[float, float] | None:
    """The right end of a line; None where it has no points."""
    points = sorted(drawn(rows, x, y), key=lambda row: row[x])
    return (float(points[-1][x]), float(points[-1][y])) if points else None
