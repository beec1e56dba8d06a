"""Nulls: what random directions and permuted labels give, and where the observed value lies among them."""

from collections.abc import Sequence

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, drawn, select, shown, two_digits
from subspace_probe.figures.theme import Place, colours, panels, rule

COLUMNS = ("direction", "behaviour", "kind", "value")
BINS = 50


def _plot(report: Report) -> go.Figure:
    rows = report.tables["nulls"].records()
    drawable = drawn(rows, "value")
    wanted = distinct((row["direction"], row["behaviour"]) for row in rows)
    kinds = [kind for kind in distinct(row["kind"] for row in rows) if kind != "observed"]
    low, high = _range([float(row["value"]) for row in drawable])
    figure, places = panels(
        [f"{shown(direction)} direction: {shown(behaviour)}" for direction, behaviour in wanted],
        height=210,
        legend=bool(kinds),
        horizontal_spacing=0.07,
    )
    for index, ((direction, behaviour), place) in enumerate(zip(wanted, places, strict=True)):
        panel = select(drawable, direction=direction, behaviour=behaviour)
        for kind in kinds:
            _histogram(figure, place, select(panel, kind=kind), kind, (low, high), named=index == 0)
        for row in select(panel, kind="observed"):
            _observed(figure, place, row, colours([direction])[direction], middle=(low + high) / 2)
    margin = 0.03 * (high - low)
    figure.update_xaxes(range=[low - margin, high + margin], showticklabels=True)
    for row in range(1, max(row for row, _ in places) + 1):
        figure.update_yaxes(title_text="draws", row=row, col=1)
    return figure.update_layout(barmode="overlay")


def _histogram(
    figure: go.Figure, place: Place, rows: Sequence[Row], kind: str, limits: tuple[float, float], *, named: bool
) -> None:
    low, high = limits
    size = (high - low) / BINS
    colour = colours([kind])[kind]
    figure.add_histogram(
        x=[row["value"] for row in rows],
        name=shown(kind),
        legendgroup=kind,
        showlegend=named,
        xbins={"start": low - size / 2, "end": high + size / 2, "size": size},
        marker={"color": colour, "line": {"color": colour, "width": 1}},
        opacity=0.55,
        hovertemplate=f"{shown(kind)}<br>%{{x}}: %{{y}} draws<extra></extra>",
        row=place[0],
        col=place[1],
    )


def _observed(figure: go.Figure, place: Place, row: Row, colour: str, *, middle: float) -> None:
    line, column = place
    rule(figure, place, x=row["value"], color=colour, width=3, dash="solid")
    right = row["value"] > middle
    figure.add_annotation(
        text=f"observed {two_digits(row['value'])}",
        x=row["value"],
        y=0.96,
        yref="y domain",
        showarrow=False,
        xanchor="right" if right else "left",
        xshift=-7 if right else 7,
        font={"color": colour},
        bgcolor="rgba(255,255,255,0.85)",
        row=line,
        col=column,
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The unit interval for shares, else from the least value to the greatest."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


NULLS = Drawing(
    title="Would chance do the same?",
    reading="Each histogram holds the same measurement made with directions that mean nothing; the line is the "
    "direction that was found.",
    needs={"nulls": COLUMNS},
    plot=_plot,
)
