"""Token searches by budget: the share of prompts each had flipped, in rows and in layer-forwards."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.lines import banded, last
from subspace_probe.figures.rows import distinct, select, shown
from subspace_probe.figures.theme import colours, end_labels, panels

COLUMNS = ("search", "unit", "budget", "flipped", "low", "high")
DASHES = {"random": "dot", "answer": "dash"}
HOVER = "%{fullData.name}, %{x} a prompt<br>%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<extra></extra>"
LIMITS = (-0.04, 1.06)


def _plot(report: Report) -> go.Figure:
    rows = report.tables["curve"].records()
    units = distinct(row["unit"] for row in rows)
    palette = colours(row["search"] for row in rows)
    figure, places = panels([f"by {shown(unit)}" for unit in units])
    for unit, place in zip(units, places, strict=True):
        panel = select(rows, unit=unit)
        ends: list[tuple[str, float, float, str]] = []
        for search in distinct(row["search"] for row in panel):
            line = select(panel, search=search)
            banded(
                figure, place, line, x="budget", y="flipped", name=shown(search), colour=palette[search], hover=HOVER,
                dash=DASHES.get(search, "solid"),
            )  # fmt: skip
            if end := last(line, "budget", "flipped"):
                ends.append((shown(search), *end, palette[search]))
        end_labels(figure, place, ends, LIMITS)
        figure.update_xaxes(title_text=f"{shown(unit)} a prompt", row=place[0], col=place[1])
    figure.update_yaxes(range=LIMITS, tickformat=".0%", dtick=0.25)
    figure.update_yaxes(title_text="share of prompts flipped", col=1)
    return figure


SEARCHES = Drawing(
    title="What does a target inside the model save a search?",
    reading="A line that rises earlier needs less: in rows the model was run on, and in blocks that those rows went "
    "through, which is less for a target that is read before the last layer. Bands are 95 % intervals over prompts.",
    needs={"curve": COLUMNS},
    plot=_plot,
)
