"""Dose and response: behaviour against the strength of steering, for each direction and a random one."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.lines import banded, last
from subspace_probe.figures.rows import distinct, finite, select, shown
from subspace_probe.figures.theme import FAINT, Place, colours, end_labels, panels, rule

COLUMNS = ("direction", "behaviour", "strength", "rate", "low", "high")
DASHES = {"random": "dot", "refusal": "dash", "moved the wrong way": "dashdot", "in words": "longdash"}
UNITS = {
    "scale": "strength, in units of the direction's scale",
    "norm": "strength, as a share of each state's norm",
    "raw": "strength, in activation units",
}
HOVER = "%{fullData.name}, strength %{x:g}<br>%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<extra></extra>"
LIMITS = (-0.04, 1.06)


def _plot(report: Report) -> go.Figure:
    rows = report.tables["strength"].records()
    behaviours = distinct(row["behaviour"] for row in rows)
    palette = colours(row["direction"] for row in rows)
    figure, places = panels([shown(behaviour) for behaviour in behaviours])
    for behaviour, place in zip(behaviours, places, strict=True):
        panel = select(rows, behaviour=behaviour)
        ends: list[tuple[str, float, float, str]] = []
        for direction in sorted(distinct(row["direction"] for row in panel), key=lambda name: name != "random"):
            line = select(panel, direction=direction)
            banded(
                figure,
                place,
                line,
                x="strength",
                y="rate",
                name=shown(direction),
                colour=palette[direction],
                hover=HOVER,
                dash=DASHES.get(direction, "solid"),
            )
            if end := last(line, "strength", "rate"):
                ends.append((shown(direction), *end, palette[direction]))
        rule(figure, place, x=0)
        for strength in _broken(report):
            _mark(figure, place, strength)
        end_labels(figure, place, ends, LIMITS)
    reach = [value for row in rows if (value := finite(row["strength"])) is not None] or [0.0]
    room = 0.03 * (max(reach) - min(reach)) or 0.5
    unit = UNITS.get(str(report.provenance.config.get("unit", "scale")), UNITS["scale"])
    figure.update_xaxes(title_text=unit, range=[min(reach) - room, max(reach) + room])
    figure.update_yaxes(range=LIMITS, tickformat=".0%", dtick=0.25)
    figure.update_yaxes(title_text="share of prompts", col=1)
    return figure


def _broken(report: Report) -> list[float]:
    """The smallest strength of either sign at which the text had degenerated, where that was looked at."""
    text = report.tables.get("text")
    if text is None or not {"strength", "degenerate"} <= set(text.columns):
        return []
    at = [float(row["strength"]) for row in text.records() if row["degenerate"]]
    signs = [[strength for strength in at if strength < 0], [strength for strength in at if strength > 0]]
    return [min(found, key=abs) for found in signs if found]


def _mark(figure: go.Figure, place: Place, strength: float) -> None:
    rule(figure, place, x=strength, dash="dash")
    figure.add_annotation(
        text="text degenerates",
        x=strength,
        y=0.5,
        yref="y domain",
        textangle=-90,
        xanchor="right" if strength > 0 else "left",
        showarrow=False,
        font={"color": FAINT, "size": 12},
        row=place[0],
        col=place[1],
    )


STRENGTH = Drawing(
    title="What does steering change, and how much of it?",
    reading="A direction that drives a behaviour moves it steadily with strength while a random direction of the same "
    "size leaves it where it was; bands are 95 % intervals over prompts. Where the text degenerates, it is no "
    "longer the behaviour that is measured.",
    needs={"strength": COLUMNS},
    plot=_plot,
)
