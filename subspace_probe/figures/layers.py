"""Layer curves: where in the network a direction reads its concept, at each position."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.lines import banded, last
from subspace_probe.figures.rows import Row, distinct, drawn, finite, select, shown, two_digits
from subspace_probe.figures.theme import FAINT, Place, colours, end_labels, panels, rule

COLUMNS = ("site", "layer", "position", "direction", "auroc", "low", "high", "chosen")
DASHES = {"t_inst": "solid", "t_post_inst": "dash"}
HOVER = "%{fullData.name}, layer %{x}<br>AUROC %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>"


def _plot(report: Report) -> go.Figure:
    rows = report.tables["layers"].records()
    for row in rows:  # one line for each position, and for each stream where a study reads several
        row["stream"] = str(row["site"]).rpartition(".")[2].removeprefix("hook_")
    streams = distinct(row["stream"] for row in rows)
    directions = distinct(row["direction"] for row in rows)
    figure, places = panels([f"{shown(name)} direction" for name in directions])
    low, high = _range(rows)
    for direction, place in zip(directions, places, strict=True):
        panel = select(rows, direction=direction)
        palette = colours(row["position"] for row in rows)
        ends: list[tuple[str, float, float, str]] = []
        for position, stream in distinct((row["position"], row["stream"]) for row in panel):
            line = select(panel, position=position, stream=stream)
            name = shown(position) if len(streams) == 1 else f"{shown(position)}, {shown(stream)}"
            banded(
                figure,
                place,
                line,
                x="layer",
                y="auroc",
                name=name,
                colour=palette[position],
                hover=HOVER,
                dash=DASHES.get(position, "dot"),
            )
            if end := last(line, "layer", "auroc"):
                ends.append((name, *end, palette[position]))
        _mark_chosen(figure, place, drawn(select(panel, chosen=True), "auroc"), palette)
        rule(figure, place, y=0.5)
        end_labels(figure, place, ends, (low, high))
    layers = distinct(row["layer"] for row in rows)
    figure.update_xaxes(title_text="layer", range=[min(layers) - 0.4, max(layers) + 0.4])
    if len(layers) <= 12:
        figure.update_xaxes(tickmode="array", tickvals=sorted(layers))
    figure.update_yaxes(range=[low, high], tickmode="array", tickvals=[tick / 10 for tick in range(11)])
    figure.update_yaxes(title_text="AUROC, held-out prompts", col=1)
    return figure


def _mark_chosen(figure: go.Figure, place: Place, rows: list[Row], palette: dict[str, str]) -> None:
    row, col = place
    for chosen in rows:
        figure.add_scatter(
            x=[chosen["layer"]],
            y=[chosen["auroc"]],
            mode="markers",
            name="chosen",
            hoverinfo="skip",
            marker={"size": 15, "symbol": "circle-open", "color": palette[chosen["position"]], "line": {"width": 2.5}},
            row=row,
            col=col,
        )
        figure.add_annotation(
            text=f"chosen: layer {chosen['layer']}, {two_digits(chosen['auroc'])}",
            x=chosen["layer"],
            y=chosen["auroc"],
            ax=0,
            ay=-30,
            arrowhead=0,
            arrowwidth=1,
            arrowcolor=FAINT,
            standoff=9,
            font={"size": 12},
            bgcolor="rgba(255,255,255,0.85)",
            row=row,
            col=col,
        )


def _range(rows: list[dict[str, object]]) -> tuple[float, float]:
    """From chance, or below where a curve goes below, to 1 and room for a label."""
    values = [finite(row[name]) for row in rows for name in ("auroc", "low")]  # pyright: ignore[reportArgumentType]
    return min([0.45, *(value - 0.05 for value in values if value is not None)]), 1.17


LAYERS = Drawing(
    title="Where can each direction be read?",
    reading="Higher is better and the dotted line is chance; the ringed layer was chosen on validation prompts, "
    "and bands are 95 % intervals over prompts.",
    needs={"layers": COLUMNS},
    plot=_plot,
)
