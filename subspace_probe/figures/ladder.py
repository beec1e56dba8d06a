"""The realisability ladder: how often each level meets the target and flips the behaviour, beside its controls."""

from collections.abc import Sequence

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, drawn, finite, select, shown
from subspace_probe.figures.theme import INK, OTHERS, Place, colours, panels

COLUMNS = ("site", "level", "measure", "condition", "rate", "low", "high", "n")
FIXED = {"rerouted": "#0072B2", "random": colours(["random"])["random"], "wrong direction": "#E69F00"}
PATTERNS = {"random": "/", "wrong direction": "x"}
HOVER = "%{fullData.name}, %{x}<br>%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<br>%{customdata[2]} prompts"


def _plot(report: Report) -> go.Figure:
    rows = report.tables["ladder"].records()
    sites, measures = distinct(row["site"] for row in rows), distinct(row["measure"] for row in rows)
    levels, conditions = distinct(row["level"] for row in rows), distinct(row["condition"] for row in rows)
    wanted = [(site, measure) for site in sites for measure in measures]
    figure, places = panels(
        [f"{shown(site)}: {shown(measure)}" for site, measure in wanted],
        across=len(measures),
        height=260,
        legend=True,
        horizontal_spacing=0.07,
    )
    for index, ((site, measure), place) in enumerate(zip(wanted, places, strict=True)):
        panel = select(rows, site=site, measure=measure)
        for number, condition in enumerate(conditions):
            _bars(figure, place, select(panel, condition=condition), condition, number, named=index == 0)
    figure.update_xaxes(categoryorder="array", categoryarray=[shown(level) for level in levels])
    figure.update_yaxes(range=(0, 1.06), tickformat=".0%", dtick=0.25)
    for row in range(1, len(sites) + 1):
        figure.update_yaxes(title_text="share of prompts", row=row, col=1)
    return figure.update_layout(barmode="group", bargap=0.25)


def _bars(figure: go.Figure, place: Place, rows: Sequence[Row], condition: str, number: int, *, named: bool) -> None:
    """One condition at every level; a level without a number has no bar, one without an interval no whisker."""
    points = drawn(rows, "rate")
    ends = [(finite(row["low"]), finite(row["high"])) for row in points]
    figure.add_bar(
        x=[shown(row["level"]) for row in points],
        y=[row["rate"] for row in points],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [
                0 if high is None else max(0, high - row["rate"]) for row, (_, high) in zip(points, ends, strict=True)
            ],
            "arrayminus": [
                0 if low is None else max(0, row["rate"] - low) for row, (low, _) in zip(points, ends, strict=True)
            ],
            "color": INK,
            "thickness": 1,
            "width": 3,
        },
        customdata=[[row["low"], row["high"], row["n"]] for row in points],
        name=shown(condition),
        legendgroup=condition,
        showlegend=named,
        marker={
            "color": FIXED.get(condition, OTHERS[number % len(OTHERS)]),
            "pattern": {"shape": PATTERNS.get(condition, ""), "fgcolor": "white", "size": 6, "fillmode": "overlay"},
        },
        hovertemplate=f"{HOVER}<extra></extra>",
        row=place[0],
        col=place[1],
    )


LADDER = Drawing(
    title="Who can take the states there, and does behaviour follow?",
    reading="Bars that stand above their controls at the activation level and not at the token level are a guard that "
    "can be steered but not reached; whiskers are 95 % intervals over prompts, or the range over random draws.",
    needs={"ladder": COLUMNS},
    plot=_plot,
)
