"""Utility kept and harm removed by a projected update, against the fraction of directions taken out."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.lines import banded, last
from subspace_probe.figures.rows import distinct, select, shown
from subspace_probe.figures.theme import colours, end_labels, panels, rule

COLUMNS = ("side", "kind", "measure", "fraction", "share", "low", "high", "energy")
DASHES = {"alignment": "solid"}
HOVER = "%{fullData.name}, fraction %{x:g}<br>%{y:.0%} [%{customdata[0]:.0%}, %{customdata[1]:.0%}]<extra></extra>"
LIMITS = (-0.3, 1.15)


def _plot(report: Report) -> go.Figure:
    rows = report.tables["projection"].records()
    sides, measures = (distinct(row[name] for row in rows) for name in ("side", "measure"))
    palette = colours(row["kind"] for row in rows)
    wanted = [(side, measure) for side in sides for measure in measures]
    figure, places = panels([f"{shown(side)}: {shown(measure)}" for side, measure in wanted], height=240)
    for (side, measure), place in zip(wanted, places, strict=True):
        panel = select(rows, side=side, measure=measure)
        ends: list[tuple[str, float, float, str]] = []
        for kind in distinct(row["kind"] for row in panel):
            line = select(panel, kind=kind)
            banded(
                figure,
                place,
                line,
                x="fraction",
                y="share",
                name=shown(kind),
                colour=palette[kind],
                hover=HOVER,
                dash=DASHES.get(kind, "dot"),
            )
            if end := last(line, "fraction", "share"):
                ends.append((shown(kind), *end, palette[kind]))
        for edge in (0, 1):
            rule(figure, place, y=edge)
        end_labels(figure, place, ends, LIMITS)
    figure.update_xaxes(title_text="fraction of directions")
    figure.update_yaxes(range=LIMITS, tickformat=".0%", dtick=0.5)
    return figure


PROJECTION = Drawing(
    title="Can the harm be taken out of an update without its utility?",
    reading="A distinct subspace shows as a fraction at which both lines of a row are near 100 % while random "
    "subspaces of the same energy (bands: 95 % of the draws) are not. Where harm goes only as utility goes, there is "
    "none.",
    needs={"projection": COLUMNS},
    plot=_plot,
    findings=("selectivity", "selectivity.above_random"),
)
