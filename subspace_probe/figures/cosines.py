"""Cosines between directions: the matrix, and beside it each cosine over the range that its null gives."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, drawn, finite, shown, two_digits
from subspace_probe.figures.theme import FAINT, GRID, INK, NULL

COLUMNS = ("a", "b", "position_a", "position_b", "kind", "cosine", "null_low", "null_high")
SCALE = [[0.0, "#0072B2"], [0.5, "#ffffff"], [1.0, "#D55E00"]]
OUTSIDE = "#D55E00"


def _plot(report: Report) -> go.Figure:
    rows = report.tables["cosines"].records()
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.44, 0.56],
        horizontal_spacing=0.06,
        subplot_titles=["cosine of each pair", "each cosine over the range of its null"],
    )
    figure.update_annotations(font_size=14)
    _matrix(figure, rows)
    _dots(figure, rows)
    return figure.update_layout(height=max(430, 66 * len(rows) + 150), showlegend=False, margin_r=128)


def _matrix(figure: go.Figure, rows: Sequence[Row]) -> None:
    ends = [((r["a"], r["position_a"]), (r["b"], r["position_b"])) for r in rows]
    every = distinct(name for pair in ends for name in pair)
    names = [name for first in distinct(first for first, _ in every) for name in every if name[0] == first]
    labels = [f"{shown(name)}<br>{shown(position)}" for name, position in names]
    grid: list[list[float | None]] = [[1.0 if i == j else None for j in names] for i in names]
    for (a, b), row in zip(ends, rows, strict=True):
        i, j = names.index(a), names.index(b)
        if grid[i][j] is None:
            grid[i][j] = grid[j][i] = finite(row["cosine"])
    # What was not measured stays grey: white is a cosine of zero.
    figure.add_shape(
        type="rect",
        x0=0,
        x1=1,
        y0=0,
        y1=1,
        xref="x domain",
        yref="y domain",
        layer="below",
        fillcolor=GRID,
        line_width=0,
        row=1,
        col=1,
    )
    figure.add_heatmap(
        z=grid,
        x=list(range(len(names))),
        y=list(range(len(names))),
        zmin=-1,
        zmax=1,
        colorscale=SCALE,
        showscale=False,
        text=[["·" if v is None else two_digits(v) for v in line] for line in grid],
        texttemplate="%{text}",
        textfont={"size": 14},
        xgap=3,
        ygap=3,
        hoverinfo="text",
        row=1,
        col=1,
    )
    ticks = {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": labels,
        "showgrid": False,
        "tickfont_size": 12,
    }
    figure.update_xaxes(**ticks, showline=False, ticks="", tickangle=0 if len(names) <= 3 else -35, row=1, col=1)
    figure.update_yaxes(**ticks, autorange="reversed", row=1, col=1)


def _dots(figure: go.Figure, rows: Sequence[Row]) -> None:
    for level, row in enumerate(rows):
        pair = _pair(row)
        colour = OUTSIDE if _outside(row) else INK
        text = f"{pair}<br><span style='color:{FAINT}'>{shown(row['kind'])}</span>"
        _text(figure, text, 0, level, yanchor="bottom", yshift=8, align="left", font_size=12)
        if drawn([row], "null_low", "null_high"):
            null = f"[{two_digits(row['null_low'])}, {two_digits(row['null_high'])}]"
            figure.add_scatter(
                x=[row["null_low"], row["null_high"]],
                y=[level, level],
                mode="lines",
                name="null",
                line={"color": NULL, "width": 10},
                opacity=0.45,
                hovertemplate=f"null {null}<extra></extra>",
                row=1,
                col=2,
            )
            _text(figure, f"null {null}", 1, level, xshift=10, yshift=-8, font={"size": 12, "color": FAINT})
        value = f"<b>{two_digits(row['cosine'])}</b>" if drawn([row], "cosine") else "not computed"
        _text(figure, value, 1, level, xshift=10, yshift=8, font_color=colour)
        if drawn([row], "cosine"):
            figure.add_scatter(
                x=[row["cosine"]],
                y=[level],
                mode="markers",
                name="cosine",
                marker={"size": 12, "color": colour, "line": {"color": "white", "width": 1}},
                hovertemplate=f"{pair}<br>%{{x:.3f}}<extra></extra>",
                row=1,
                col=2,
            )
    figure.update_xaxes(range=[-1.05, 1.05], title_text="cosine", zeroline=True, zerolinecolor=NULL, row=1, col=2)
    figure.update_yaxes(range=[len(rows) - 0.6, -0.85], showticklabels=False, showgrid=False, row=1, col=2)


def _text(figure: go.Figure, text: str, x: int, level: int, **look: Any) -> None:
    """Text beside a dot, `x` of the panel's width from its left edge."""
    place: dict[str, Any] = {
        "xref": "x domain",
        "xanchor": "left",
        "showarrow": False,
        "bgcolor": "white",
        "borderpad": 0,
    }
    figure.add_annotation(text=text, x=x, y=level, row=1, col=2, **place, **look)


def _pair(row: Row) -> str:
    a, b, where_a, where_b = (shown(row[column], 24) for column in ("a", "b", "position_a", "position_b"))
    if a == b:
        return f"{a}: {where_a} · {where_b}"
    return f"{a} · {b} @ {where_a}" if where_a == where_b else f"{a} @ {where_a} · {b} @ {where_b}"


def _outside(row: Row) -> bool:
    """Whether the cosine lies outside its null's range, and so wants the stronger colour."""
    return bool(drawn([row], "null_low", "null_high")) and not row["null_low"] <= row["cosine"] <= row["null_high"]


COSINES = Drawing(
    title="Are they the same direction?",
    reading="A cosine says something only outside the grey range that its null gives, and only next to its controls: "
    "the same contrast at two positions, two contrasts at one position.",
    needs={"cosines": COLUMNS},
    plot=_plot,
)
