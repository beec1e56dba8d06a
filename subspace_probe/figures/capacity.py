"""Illusion capacity: what a subspace does, beside the whole state and the strongest patch the site could host."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import distinct, drawn, finite, select, shown
from subspace_probe.figures.theme import INK, NULL, Place, panels, rule

COLUMNS = ("patch", "kind", "value", "low", "high")
KINDS = {"first order": (NULL, "/"), "run": ("#0072B2", "")}


def _plot(report: Report) -> go.Figure:
    rows = report.tables["capacity"].records()
    patches = distinct(row["patch"] for row in rows)
    figure, (place,) = panels([""], across=1, height=62 * len(patches) + 40, legend=True)
    for kind, (colour, pattern) in KINDS.items():
        found = drawn(select(rows, kind=kind), "value")
        ends = [(finite(row["low"]), finite(row["high"])) for row in found]
        values = [float(row["value"]) for row in found]
        figure.add_bar(
            orientation="h",
            y=[shown(row["patch"]) for row in found],
            x=values,
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [0 if high is None else max(0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
                "arrayminus": [0 if low is None else max(0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
                "color": INK,
                "thickness": 1,
                "width": 3,
            },
            name=kind,
            marker={
                "color": colour,
                "pattern": {"shape": pattern, "fgcolor": "white", "size": 6, "fillmode": "overlay"},
            },
            hovertemplate=f"%{{y}}, {kind}<br>%{{x:.1%}}<extra></extra>",
            row=1,
            col=1,
        )
    return _axes(figure, place, [shown(patch) for patch in patches])


def _axes(figure: go.Figure, place: Place, names: list[str]) -> go.Figure:
    for edge in (0, 1):
        rule(figure, place, x=edge)
    figure.update_xaxes(title_text="share of the difference between the partners", tickformat=".0%")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return figure.update_layout(barmode="group", bargap=0.3)


CAPACITY = Drawing(
    title="How strong an illusion could this site host?",
    reading="Where the strongest patch does much more than the whole state, the site can host an illusion of that "
    "strength whatever the truth is, and the effect of an exchange alone says nothing about mechanism.",
    needs={"capacity": COLUMNS},
    plot=_plot,
    findings=("mechanism.capacity",),
)
