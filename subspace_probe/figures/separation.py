"""Separation: where the prompts of the four cells (harmful x refused) lie along each direction, at each position."""

from collections.abc import Sequence

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, drawn, select, shown
from subspace_probe.figures.theme import FAINT, Place, colours, panels, translucent

COLUMNS = ("position", "direction", "cell", "framing", "value")
CELLS = ("harmful, refused", "harmful, complied", "harmless, refused", "harmless, complied")
SYMBOLS = ("circle", "diamond", "triangle-up", "square", "cross", "x")
GOLDEN = 0.6180339887498949


def _plot(report: Report) -> go.Figure:
    every = report.tables["separation"].records()
    rows = drawn(every, "value")
    positions, directions = distinct(r["position"] for r in every), distinct(r["direction"] for r in every)
    cells = distinct([*(c for c in CELLS if any(r["cell"] == c for r in every)), *(r["cell"] for r in every)])
    framings = distinct(row["framing"] for row in every)
    wanted = [(direction, position) for direction in directions for position in positions]
    figure, places = panels(
        [f"{shown(direction)} direction, at {shown(position)}" for direction, position in wanted],
        across=len(positions),
        height=250,
        legend=len(framings) > 1,
        horizontal_spacing=0.05,
        shared_xaxes="rows",
    )
    for (direction, position), place in zip(wanted, places, strict=True):
        for level, cell in enumerate(cells):
            members = select(rows, direction=direction, position=position, cell=cell)
            _strip(figure, place, members, len(cells) - 1 - level, cell, framings)
    _explain_symbols(figure, framings)
    figure.update_xaxes(zeroline=True, zerolinecolor=FAINT, zerolinewidth=1, showticklabels=True)
    for column in range(1, len(positions) + 1):
        figure.update_xaxes(title_text="coordinate along the direction", row=len(directions), col=column)
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(cells)))[::-1],
        ticktext=[shown(cell) for cell in cells],
        range=[-0.6, len(cells) - 0.4],
        showgrid=False,
    )
    return figure


def _strip(figure: go.Figure, place: Place, rows: Sequence[Row], level: int, cell: str, framings: list[str]) -> None:
    """One cell of one panel: its outline above the line, its prompts below."""
    row, col = place
    colour = colours([cell])[cell]
    if not rows:
        figure.add_annotation(
            text="no prompts",
            x=0.5,
            xref="x domain",
            y=level,
            showarrow=False,
            font={"color": FAINT, "size": 12},
            row=row,
            col=col,
        )
        return
    values = [r["value"] for r in rows]
    if len(set(values)) > 2:
        figure.add_violin(
            x=values,
            y0=level,
            orientation="h",
            side="positive",
            width=0.8,
            points=False,
            hoverinfo="skip",
            line_width=1,
            line_color=colour,
            fillcolor=translucent(colour, 0.3),
            spanmode="hard",
            name=cell,
            showlegend=False,
            row=row,
            col=col,
        )
    # Points are moved apart by a golden-ratio sequence: even, and the same each time.
    figure.add_scatter(
        x=values,
        y=[level - 0.08 - 0.28 * (i * GOLDEN % 1) for i in range(len(rows))],
        mode="markers",
        marker={
            "size": 4.5,
            "color": colour,
            "opacity": 0.65,
            "symbol": [SYMBOLS[framings.index(r["framing"]) % len(SYMBOLS)] for r in rows],
        },
        customdata=[shown(r["framing"]) for r in rows],
        name=cell,
        showlegend=False,
        hovertemplate=f"{shown(cell)}, %{{customdata}}<br>%{{x:.2f}}<extra></extra>",
        row=row,
        col=col,
    )


def _explain_symbols(figure: go.Figure, framings: list[str]) -> None:
    for framing, symbol in zip(framings, SYMBOLS, strict=False):
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=f"{shown(framing)} framing",
            marker={"symbol": symbol, "size": 9, "color": FAINT},
            row=1,
            col=1,
        )


SEPARATION = Drawing(
    title="What separates at which position?",
    reading="Harmfulness is encoded where harmful and harmless prompts part whatever the answer; refusal where refused "
    "and complied prompts part whatever the request.",
    needs={"separation": COLUMNS},
    plot=_plot,
)
