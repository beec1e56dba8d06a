"""Selection: the scores of every candidate (position, layer), which were kept and which one was chosen."""

from collections.abc import Sequence

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, drawn, finite, select, shown, two_digits
from subspace_probe.figures.theme import FAINT, INK, Place, colours, panels

COLUMNS = ("position", "layer", "bypass", "induce", "kl", "kept", "chosen")
SCORES = {
    "bypass": "bypass: refusal left when ablated<br>(lower is better)",
    "induce": "induce: refusal gained when steered<br>(higher is better)",
    "kl": "KL: harm done to harmless prompts<br>(lower is better)",
}


def _plot(report: Report) -> go.Figure:
    rows = report.tables["selection"].records()
    positions = distinct(row["position"] for row in rows)
    palette = colours(map(str, positions))
    figure, places = panels(
        list(SCORES.values()), across=3, height=290, legend=True, shared_yaxes=False, horizontal_spacing=0.07
    )
    figure.update_annotations(font_size=13)
    for score, place in zip(SCORES, places, strict=True):
        for position in positions:
            line = sorted(select(rows, position=position), key=lambda row: row["layer"])
            _line(figure, place, line, score, palette[str(position)], named=score == "bypass")
        for row in drawn(select(rows, chosen=True), score):
            _ring(figure, place, row, score)
        figure.update_yaxes(range=_range(drawn(rows, score), score), row=place[0], col=place[1])
    layers = sorted(distinct(row["layer"] for row in rows))
    figure.update_xaxes(title_text="layer", range=[layers[0] - 0.4, layers[-1] + 0.4])
    if len(layers) <= 8:
        figure.update_xaxes(tickmode="array", tickvals=layers)
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        name="not kept",
        row=1,
        col=1,
        marker={"symbol": "circle-open", "size": 9, "color": FAINT},
    )
    return figure.update_layout(margin_t=100)


def _line(figure: go.Figure, place: Place, rows: Sequence[Row], score: str, colour: str, *, named: bool) -> None:
    position = shown(rows[0]["position"])
    figure.add_scatter(
        x=[row["layer"] for row in rows],
        y=[finite(row[score]) for row in rows],
        mode="lines+markers",
        name=position,
        legendgroup=position,
        showlegend=named,
        line={"color": colour, "width": 2},
        marker={"size": 9, "color": colour, "symbol": ["circle" if row["kept"] else "circle-open" for row in rows]},
        customdata=["kept" if row["kept"] else "not kept" for row in rows],
        hovertemplate=f"{position}, layer %{{x}}, %{{customdata}}<br>{score} %{{y:.3f}}<extra></extra>",
        row=place[0],
        col=place[1],
    )


def _ring(figure: go.Figure, place: Place, row: Row, score: str) -> None:
    line, column = place
    figure.add_scatter(
        x=[row["layer"]],
        y=[row[score]],
        mode="markers",
        hoverinfo="skip",
        showlegend=False,
        name="chosen",
        marker={"size": 19, "symbol": "circle-open", "color": INK, "line": {"width": 2}},
        row=line,
        col=column,
    )
    figure.add_annotation(
        text=f"chosen {two_digits(row[score])}",
        x=row["layer"],
        y=row[score],
        ax=0,
        ay=-30 if score == "induce" else 30,
        standoff=10,
        arrowhead=0,
        arrowcolor=FAINT,
        arrowwidth=1,
        font={"size": 12},
        bgcolor="rgba(255,255,255,0.85)",
        row=line,
        col=column,
    )


def _range(rows: Sequence[Row], score: str) -> tuple[float, float] | None:
    """Room above and below for the label of the chosen one; None, and plotly's own range, where there are no scores."""
    values = [float(row[score]) for row in rows]
    if not values:
        return None
    reach = max(values) - min(values) or 1.0
    return min(values) - 0.25 * reach, max(values) + 0.25 * reach


SELECTION = Drawing(
    title="How was the direction chosen?",
    reading="Candidates that fail a threshold are hollow; of those kept, the ringed one leaves the least refusal when "
    "it is ablated.",
    needs={"selection": COLUMNS},
    plot=_plot,
)
