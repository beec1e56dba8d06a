"""The illusion panel: what exchanging the subspace does, beside its parts, what contains it, and random subspaces."""

from collections.abc import Sequence

import plotly.graph_objects as go

from subspace_probe.core.findings import Finding
from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, drawn, finite, select, shown
from subspace_probe.figures.theme import COLOURS, FAINT, INK, NULL, Place, panels, rule, translucent

COLUMNS = ("part", "kind", "value", "low", "high", "flips", "flips_low", "flips_high")
MEASURES = {
    "share of the difference moved": ("value", "low", "high"),
    "prompts that change sides": ("flips", "flips_low", "flips_high"),
}
SUBSPACE, PARTS, CONTAINERS = COLOURS["harmfulness"], "#CC79A7", "#0072B2"
GOLDEN = 0.6180339887498949


def _plot(report: Report) -> go.Figure:
    rows = report.tables["illusion"].records()
    names = distinct(row["part"] for row in rows)
    levels = {name: len(names) - 1 - index for index, name in enumerate(names)}
    figure, places = panels(list(MEASURES), height=44 * len(names) + 40, horizontal_spacing=0.05)
    for place, (measure, columns) in zip(places, MEASURES.items(), strict=True):
        _random(figure, place, select(rows, kind="null"), columns[0], levels)
        for edge in (0, 1):
            rule(figure, place, x=edge)
        for row in select(rows, kind="observed"):
            _point(figure, place, row, columns, levels[row["part"]], measure)
        figure.update_xaxes(range=_range(rows, columns), tickformat=".0%", row=place[0], col=place[1])
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(levels.values()),
        ticktext=[shown(name, 34) for name in levels],
        range=[-0.6, len(names) - 0.4],
        showgrid=False,
    )
    return figure


def _random(figure: go.Figure, place: Place, rows: Sequence[Row], column: str, levels: dict[str, int]) -> None:
    """The draws on their own line, and the range they span as a band behind all lines."""
    found = drawn(rows, column)
    if not found:
        return
    values = [float(row[column]) for row in found]
    figure.add_shape(
        type="rect",
        x0=min(values),
        x1=max(values),
        y0=0,
        y1=1,
        yref="y domain",
        layer="below",
        line_width=0,
        fillcolor=translucent(NULL, 0.18),
        row=place[0],
        col=place[1],
    )
    # Points are moved apart by a golden-ratio sequence: even, and the same each time.
    figure.add_scatter(
        x=values,
        y=[levels[row["part"]] + 0.5 * (i * GOLDEN % 1) - 0.25 for i, row in enumerate(found)],
        mode="markers",
        name="random subspaces",
        marker={"size": 5, "color": NULL, "opacity": 0.7},
        hovertemplate="random subspace<br>%{x:.1%}<extra></extra>",
        row=place[0],
        col=place[1],
    )


def _point(figure: go.Figure, place: Place, row: Row, columns: tuple[str, str, str], level: int, measure: str) -> None:
    value, low, high = (finite(row[column]) for column in columns)
    if value is None:
        return
    name, at = shown(row["part"]), {"row": place[0], "col": place[1]}
    colour = SUBSPACE if name == "subspace" else PARTS if "part" in name else CONTAINERS
    figure.add_scatter(
        x=[0, value],
        y=[level, level],
        mode="lines",
        line={"color": translucent(colour, 0.3), "width": 9},
        hoverinfo="skip",
        name=name,
        **at,
    )
    if low is not None and high is not None:
        ends = {"x": [low, high], "y": [level, level], "mode": "lines", "line": {"color": INK, "width": 1.5}}
        figure.add_scatter(**ends, hoverinfo="skip", name=f"{name}, interval", **at)
    figure.add_scatter(
        x=[value],
        y=[level],
        mode="markers",
        name=name,
        marker={"size": 11, "color": colour, "line": {"color": "white", "width": 1}},
        hovertemplate=f"{name}<br>{measure}: %{{x:.1%}}<extra></extra>",
        **at,
    )
    right = value > 0.75
    figure.add_annotation(
        text=f"{value:.0%}".replace("-", "−"),  # noqa: RUF001  (a minus, not a hyphen)
        x=value,
        y=level,
        showarrow=False,
        xanchor="right" if right else "left",
        xshift=-9 if right else 9,
        yshift=13,
        font={"size": 12, "color": FAINT},
        **at,
    )


def _range(rows: Sequence[Row], columns: tuple[str, str, str]) -> list[float]:
    """From nothing to all, and as far beyond as there is something to draw."""
    values = [number for row in rows for column in columns if (number := finite(row[column])) is not None]
    low, high = min([0.0, *values]), max([1.0, *values])
    room = 0.05 * (high - low)
    return [low - room, high + room]


def dispute(report: Report) -> Sequence[str]:
    """What the two sides of the published dispute make of these numbers, where an exchange was run."""
    found = {finding.name: finding for finding in report.findings}
    use = found.get("mechanism.exchange")
    if use is None or use.verdict == "not tested":
        return ()
    if use.verdict == "refuted":
        return ("Both sides of the published dispute agree here: an exchange without effect shows no mechanism.",)
    names = {
        "mechanism.containment": "the whole component does not do what the subspace does",
        "mechanism.reader_split": "the part that is read does not act by itself",
        "mechanism.dormancy": "it acts where the model does not vary by itself",
        "mechanism.clamp": "it needs values that the model never takes",
    }
    against = [said for name, said in names.items() if name in found and found[name].verdict == "refuted"]
    if not against:
        return ("None of the signs over which the published dispute is fought was found here.",)
    return (
        f"These numbers are read differently. Makelov, Lange & Nanda (2023): {_list(against)}, so the effect is made "
        "by the patch and is no evidence of what the model uses. Wu et al. (2024): distributed codes need not lie in "
        f"what the next layer reads, so a part that is not read is ordinary geometry; what counts is {_held(use)}. "
        "Here an unread part counts against the mechanism only together with a component that does not follow, or "
        "with a part that acts and is dormant.",
    )


def _held(use: Finding) -> str:
    return f"that the exchange moves {use.estimate:.0%} of the difference, on held-out prompts and other seeds too"


def _list(said: Sequence[str]) -> str:
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


ILLUSION = Drawing(
    title="Does the whole do what the part does?",
    reading="0 is nothing, 1 all of what differs between the partners. A part that does what nothing around it does, "
    "or only together with a part that nobody reads, is a sign of an illusion; grey is what random subspaces do.",
    needs={"illusion": COLUMNS},
    plot=_plot,
    findings=("mechanism.exchange", "mechanism.containment", "mechanism.reader_split"),
    beside=dispute,
)
