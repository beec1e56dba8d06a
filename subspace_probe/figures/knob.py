"""The knob by layer: what whole states and one direction do, and the separation along it against pair accuracy."""

from collections.abc import Sequence

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.lines import banded
from subspace_probe.figures.rows import Row, distinct, finite, select, shown
from subspace_probe.figures.theme import INK, NULL, Place, colours, panels

LAYERS = ("source", "what", "layer", "rate", "low", "high", "chosen")
VARIANTS = ("share", "format", "pair_accuracy", "knob", "random", "random_low", "random_high")
HOVER = "%{fullData.name}, layer %{x}<br>%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<extra></extra>"
SYMBOLS = ("circle", "diamond", "triangle-up", "square")


def _layers(report: Report) -> go.Figure:
    rows = report.tables["knob_layers"].records()
    sources = distinct(row["source"] for row in rows)
    palette = colours(row["what"] for row in rows)
    figure, places = panels([f"states of {shown(source)}" for source in sources], legend=True)
    for source, place in zip(sources, places, strict=True):
        panel = select(rows, source=source)
        for what in distinct(row["what"] for row in panel):
            dash = "solid" if what == "direction" else "dot"
            line = select(panel, what=what)
            banded(figure, place, line, x="layer", y="rate", name=what, colour=palette[what], hover=HOVER, dash=dash)
            figure.data[-1].update(showlegend=place == places[0], legendgroup=what)
        _ring(figure, place, select(panel, chosen=True))
    layers = sorted(distinct(row["layer"] for row in rows))
    figure.update_xaxes(title_text="layer", range=[layers[0] - 0.4, layers[-1] + 0.4])
    if len(layers) <= 12:
        figure.update_xaxes(tickmode="array", tickvals=layers)
    figure.update_yaxes(range=[-0.04, 1.06], tickformat=".0%", dtick=0.25)
    return figure.update_yaxes(title_text="answers turned", col=1)


def _ring(figure: go.Figure, place: Place, rows: Sequence[Row]) -> None:
    figure.add_scatter(
        x=[row["layer"] for row in rows],
        y=[finite(row["rate"]) for row in rows],
        mode="markers",
        name="chosen",
        hoverinfo="skip",
        showlegend=False,
        marker={"size": 17, "symbol": "circle-open", "color": INK, "line": {"width": 2}},
        row=place[0],
        col=place[1],
    )


def _variants(report: Report) -> go.Figure:
    rows = report.tables["knob_variants"].records()
    forms = distinct(row["format"] for row in rows)
    figure, places = panels(["along the knob", "along random directions"], legend=True)
    palette = {"knob": colours(["knob"])["knob"], "random": NULL}
    for column, place in zip(("knob", "random"), places, strict=True):
        for form, symbol in zip(forms, SYMBOLS * len(forms), strict=False):
            part = select(rows, format=form)
            bars = {
                "symmetric": False,
                "array": [row["random_high"] - row["random"] for row in part],
                "arrayminus": [row["random"] - row["random_low"] for row in part],
                "color": NULL,
                "thickness": 1,
            }
            figure.add_scatter(
                x=[finite(row[column]) for row in part],
                y=[finite(row["pair_accuracy"]) for row in part],
                error_x=bars if column == "random" else None,
                mode="markers",
                name=f"intent as {shown(form)}",
                legendgroup=form,
                showlegend=column == "knob",
                customdata=[row["share"] for row in part],
                hovertemplate="%{customdata:.0%} of the way to the tuned model<br>separation %{x:.2f}, pair accuracy "
                "%{y:.2f}<extra></extra>",
                marker={"size": 10, "symbol": symbol, "color": palette[column]},
                row=place[0],
                col=place[1],
            )
    figure.update_xaxes(title_text="separation of the intents, in activation units", rangemode="tozero")
    figure.update_yaxes(range=[-0.04, 1.06], tickformat=".0%", dtick=0.25)
    return figure.update_yaxes(title_text="pair accuracy", col=1)


KNOB_LAYERS = Drawing(
    title="At which layers does one direction turn the answer?",
    reading="With states of another question a whole state stops working where it holds the answer instead of the "
    "intent; a direction is a knob where it still works there. The ringed layer was chosen on validation prompts.",
    needs={"knob_layers": LAYERS},
    plot=_layers,
)
KNOB_VARIANTS = Drawing(
    title="Does separation along the knob say how well a model heeds the intent?",
    reading="Each point is a model between the untuned and the tuned one. Where random directions order the models as "
    "well (right; bars hold 95 % of them), the order alone says nothing about the knob: compare the scales.",
    needs={"knob_variants": VARIANTS},
    plot=_variants,
)
