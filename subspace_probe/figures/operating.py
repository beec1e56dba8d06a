"""What every threshold would do, and where the guard's own lies: recall against false positives, few of them first."""

import math
from typing import Any

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, drawn, finite, select, shown
from subspace_probe.figures.theme import COLOURS, FAINT, INK, colours

COLUMNS = ("series", "fpr", "tpr", "threshold")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def _plot(report: Report) -> go.Figure:
    rows = drawn(report.tables["operating"].records(), "fpr", "tpr")
    names = distinct(str(row["series"]) for row in rows)
    shades = colours(names) | ({"guard": COLOURS["harmfulness"]} if "guard" in names else {})
    held = _held(report)
    least = _least(rows, held)
    figure = go.Figure()
    for index, name in enumerate(names):
        points = select(rows, series=name)
        figure.add_scatter(
            x=[max(row["fpr"], least) for row in points],
            y=[row["tpr"] for row in points],
            name=shown(name.replace("_", " ")),
            mode="lines",
            customdata=[[row["fpr"], finite(row["threshold"])] for row in points],
            hovertemplate=f"{shown(name)}<br>false positives %{{customdata[0]:.4f}}, found %{{y:.3f}}"
            "<br>threshold %{customdata[1]:.4g}<extra></extra>",
            line={"color": shades[name], "width": 2.5, "dash": DASHES[index % len(DASHES)], "shape": "linear"},
        )
    if held is not None:
        _mark(figure, held, least)
    top = math.ceil(-math.log10(least))
    ticks = [least, *(10.0**-power for power in range(top - 1, -1, -1) if 10.0**-power > 2 * least)]
    labels = ["0", *(f"{tick:g}" for tick in ticks[1:])]
    figure.update_xaxes(
        title_text="false-positive rate", type="log", range=[math.log10(least) - 0.1, 0.03], tickvals=ticks,
        ticktext=labels,
    )  # fmt: skip
    figure.update_yaxes(title_text="share of positives found", range=[-0.02, 1.03])
    return figure.update_layout(height=500, margin={"b": 110})


def _held(report: Report) -> Row | None:
    """The row of the table `threshold`, where there is one with numbers."""
    table = report.tables.get("threshold")
    rows = [] if table is None else drawn(table.records(), "fpr", "recall")
    return rows[0] if rows else None


def _least(rows: list[Row], held: Row | None) -> float:
    """Where a rate of none is drawn on a logarithmic axis: below the smallest that there is."""
    rates = [float(row["fpr"]) for row in rows] + ([float(held["fpr"])] if held else [])
    return 10 ** math.floor(math.log10(min((rate for rate in rates if rate > 0), default=0.01)) - 0.3)


def _mark(figure: go.Figure, held: Row, least: float) -> None:
    """The guard's threshold on these prompts, the interval of both rates, and the bound that was promised."""
    at = max(held["fpr"], least)
    bars: dict[str, Any] = {"mode": "lines", "hoverinfo": "skip", "showlegend": False, "opacity": 0.5}
    line = {"color": INK, "width": 3}
    if drawn([held], "fpr_low", "fpr_high"):
        ends = [max(held["fpr_low"], least), max(held["fpr_high"], least)]
        figure.add_scatter(x=ends, y=[held["recall"]] * 2, line=line, **bars)
    if drawn([held], "recall_low", "recall_high"):
        figure.add_scatter(x=[at, at], y=[held["recall_low"], held["recall_high"]], line=line, **bars)
    figure.add_scatter(
        x=[at],
        y=[held["recall"]],
        mode="markers",
        name="the threshold on these prompts",
        marker={"size": 13, "color": INK, "symbol": "diamond"},
        hovertemplate=f"threshold {held['value']:.4g}<br>false positives {held['fpr']:.4f}, found {held['recall']:.3f}"
        "<extra></extra>",
    )
    if (bound := finite(held["bound"])) is not None and bound > 0:
        figure.add_vline(x=bound, line={"color": FAINT, "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            x=math.log10(bound),  # annotations take the logarithm on such an axis
            y=0.02,
            text=f"promised: at most {bound:.3g}",
            xanchor="left",
            xshift=4,
            showarrow=False,
            font={"color": FAINT},
        )


OPERATING = Drawing(
    title="What does the guard find, at how many false positives?",
    reading="Further left and higher is better, and only the left end is of use for traffic that is mostly harmless. "
    "The diamond is the guard's own threshold, with the intervals of both rates; it should lie left of the bound that "
    "it promises.",
    needs={"operating": COLUMNS},
    plot=_plot,
    findings=("fpr.at_threshold", "tpr.at_fpr_1pct"),
)
