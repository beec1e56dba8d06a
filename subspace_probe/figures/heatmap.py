"""The heat map of a patching sweep: at which layer and token one state carries the difference."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, drawn, finite, select, shown, token, two_digits
from subspace_probe.figures.theme import Place, panels

COLUMNS = ("stream", "layer", "position", "order", "token", "head", "patched", "effect")
SCALE = [(0.0, "#0072B2"), (0.5, "#ffffff"), (1.0, "#D55E00")]
HOVER = "layer %{y}, %{customdata}<br>effect %{z:.3f}<extra></extra>"
PANELS, NUMBERED = 8, 120
"""So many positions get a panel of heads; in panels of so few cells each cell carries its number."""


def _plot(report: Report) -> go.Figure:
    rows: list[Row] = list(report.tables["patch_sweep"].records())
    if any(row["head"] is not None for row in rows):
        places = _strongest(rows)
        parts = [(f"{shown(row['stream'])} heads at {_label(row)}", select(rows, order=row["order"])) for row in places]
        across, title = "head", "head"
    else:
        parts = [(shown(name), select(rows, stream=name)) for name in distinct(row["stream"] for row in rows)]
        across, title = "order", "token"
    figure, where = panels([name for name, _ in parts], height=360)
    most = max([1.0, *(abs(row["effect"]) for row in drawn(rows, "effect"))])
    for (_, part), place in zip(parts, where, strict=True):
        _map(figure, place, part, across)
    figure.update_xaxes(title_text=title, showgrid=False, showline=False, ticks="")
    figure.update_yaxes(showgrid=False).update_yaxes(title_text="layer", col=1)
    bar = {"title": {"text": "effect"}, "thickness": 12, "outlinewidth": 0}
    axis = {"colorscale": SCALE, "cmin": -most, "cmax": most, "colorbar": bar}
    return figure.update_layout(coloraxis=axis, margin_r=96)


def _map(figure: go.Figure, place: Place, rows: list[Row], across: str) -> None:
    """One panel: layers upwards, positions or heads to the right."""
    ticks = {row[across]: (str(row["head"]) if across == "head" else _label(row)) for row in rows}
    xs, layers = sorted(ticks), sorted(distinct(row["layer"] for row in rows))
    found = {(row["layer"], row[across]): finite(row["effect"]) for row in rows}
    grid = [[found.get((layer, x)) for x in xs] for layer in layers]
    numbered = len(rows) <= NUMBERED
    figure.add_heatmap(
        z=grid,
        x=xs,
        y=layers,
        customdata=[[ticks[x] for x in xs]] * len(layers),
        text=[["" if value is None else two_digits(value) for value in line] for line in grid] if numbered else None,
        texttemplate="%{text}" if numbered else None,
        textfont={"size": 11},
        xgap=1,
        ygap=1,
        coloraxis="coloraxis",
        hovertemplate=HOVER,
        row=place[0],
        col=place[1],
    )
    every = max(1, len(xs) // 24)
    figure.update_xaxes(
        tickmode="array", tickvals=xs[::every], ticktext=[ticks[x] for x in xs][::every], row=place[0], col=place[1]
    )
    figure.update_yaxes(tickmode="array", tickvals=layers[:: max(1, len(layers) // 16)], row=place[0], col=place[1])


def _label(row: Row) -> str:
    """The position, and the token where it is the same in all prompts."""
    return f"{shown(row['position'])} {token(row['token'])}" if row["token"] else shown(row["position"])


def _strongest(rows: list[Row]) -> list[Row]:
    """A row of each of the positions with the largest effects, in the order of the text."""
    by_size = sorted(drawn(rows, "effect"), key=lambda row: -abs(row["effect"]))
    kept = distinct(row["order"] for row in [*by_size, *rows])[:PANELS]
    return [select(rows, order=order)[0] for order in sorted(kept)]


HEATMAP = Drawing(
    title="Which single states carry the difference?",
    reading="1 is all of the difference between clean and corrupt prompts, 0 none of it; a state counts where the "
    "colour is strong, and every state is exchanged alone.",
    needs={"patch_sweep": COLUMNS},
    plot=_plot,
)
