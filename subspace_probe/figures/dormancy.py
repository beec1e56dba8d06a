"""Dormancy: where the model's own states lie along what acts, and where the exchange puts them."""

from collections.abc import Sequence

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, drawn, select
from subspace_probe.figures.theme import FAINT, Place, panels, rule, translucent

COLUMNS = ("coordinate", "state", "label", "value", "low", "high")
COLOURS = ("#0072B2", "#D55E00")
BINS = 48


def _plot(report: Report) -> go.Figure:
    rows = report.tables["dormancy"].records()
    axes = distinct(row["coordinate"] for row in rows)
    titles = [f"coordinate {axis} of what acts, {state} states" for axis in axes for state in ("natural", "patched")]
    figure, places = panels(titles, across=1, height=170, legend=True, shared_yaxes=False)
    for index, place in enumerate(places):
        axis, state = axes[index // 2], ("natural", "patched")[index % 2]
        own = select(rows, coordinate=axis)
        limits = _limits(own)
        for label, colour in enumerate(COLOURS):
            found = drawn(select(own, state=state, label=label), "value")
            _histogram(figure, place, found, label, colour, limits, named=index == 0)
        for edge in ("low", "high"):
            for row in drawn(own, edge)[:1]:
                rule(figure, place, x=row[edge], dash="dash")
        figure.update_xaxes(range=limits, showticklabels=True, row=place[0], col=place[1])
        _range_named(figure, place, own)
    figure.update_yaxes(title_text="states")
    figure.update_xaxes(title_text="activation units", row=len(places), col=1)
    return figure.update_layout(barmode="overlay")


def _histogram(
    figure: go.Figure,
    place: Place,
    rows: Sequence[Row],
    label: int,
    colour: str,
    limits: tuple[float, float],
    *,
    named: bool,
) -> None:
    figure.add_histogram(
        x=[row["value"] for row in rows],
        name=f"class {label}, or patched towards it",
        legendgroup=str(label),
        showlegend=named,
        xbins={"start": limits[0], "end": limits[1], "size": (limits[1] - limits[0]) / BINS},
        marker={"color": translucent(colour, 0.55), "line": {"color": colour, "width": 1}},
        hovertemplate=f"class {label}<br>%{{x}}: %{{y}} states<extra></extra>",
        row=place[0],
        col=place[1],
    )


def _range_named(figure: go.Figure, place: Place, rows: Sequence[Row]) -> None:
    for row in drawn(rows, "low", "high")[:1]:
        figure.add_annotation(
            text="natural range",
            x=row["high"],
            y=1,
            yref="y domain",
            yanchor="top",
            xanchor="right",
            xshift=-4,
            showarrow=False,
            font={"color": FAINT, "size": 12},
            row=place[0],
            col=place[1],
        )


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    values = [float(row[column]) for column in ("value", "low", "high") for row in drawn(rows, column)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.03 * (high - low) or 0.5
    return low - room, high + room


DORMANCY = Drawing(
    title="Does the model vary by itself what acts?",
    reading="Patched states should lie where those of the class they imitate lie. Classes that lie on one another, "
    "with patched states far away, show a part that is dormant: only the patch moves it.",
    needs={"dormancy": COLUMNS},
    plot=_plot,
    findings=("mechanism.dormancy", "mechanism.clamp"),
)
