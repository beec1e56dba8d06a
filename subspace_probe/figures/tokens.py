"""Tokens: what each direction promotes and suppresses at the unembedding."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import distinct, drawn, select, shown, token
from subspace_probe.figures.theme import FAINT, NULL, Place, colours, panels

COLUMNS = ("direction", "rank", "token", "weight", "promoted")


def _plot(report: Report) -> go.Figure:
    rows = drawn(report.tables["tokens"].records(), "weight")
    directions = distinct(row["direction"] for row in report.tables["tokens"].records())
    longest = max(len(select(rows, direction=direction)) for direction in directions)
    figure, places = panels(
        [f"{shown(direction)} direction" for direction in directions],
        height=max(220, 22 * longest),
        shared_yaxes=False,
        horizontal_spacing=0.14,
    )
    for direction, place in zip(directions, places, strict=True):
        _bars(figure, place, select(rows, direction=direction), colours(directions)[direction])
    figure.update_xaxes(title_text="weight at the unembedding", zeroline=True, zerolinecolor=FAINT)
    return figure.update_layout(bargap=0.25)


def _bars(figure: go.Figure, place: Place, rows: list, colour: str) -> None:
    """Promoted tokens above, suppressed below, each by weight."""
    row, col = place
    ordered = sorted(rows, key=lambda r: (bool(r["promoted"]), r["weight"]))
    weights = [r["weight"] for r in ordered]
    figure.add_bar(
        x=weights,
        y=list(range(len(ordered))),
        orientation="h",
        marker_color=[colour if r["promoted"] else NULL for r in ordered],
        customdata=[[token(r["token"]), "promoted" if r["promoted"] else "suppressed", r["rank"]] for r in ordered],
        hovertemplate="%{customdata[0]}, %{customdata[1]}, rank %{customdata[2]}<br>%{x:.3f}<extra></extra>",
        row=row,
        col=col,
    )
    # Positions are numbers and tokens their labels: two tokens may look the same.
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(ordered))),
        ticktext=[token(r["token"]) for r in ordered],
        range=[-0.7, len(ordered) - 0.3],
        showgrid=False,
        tickfont={"size": 12},
        row=row,
        col=col,
    )
    for text, kind, x, anchor in (("promoted", True, 0, "left"), ("suppressed", False, 1, "right")):
        levels = [level for level, r in enumerate(ordered) if bool(r["promoted"]) is kind]
        if levels:
            # On the side of zero that these bars leave free.
            figure.add_annotation(
                text=text,
                x=x,
                xref="x domain",
                xanchor=anchor,
                xshift=8 if kind else -8,
                y=levels[-1] if kind else levels[0],
                showarrow=False,
                font={"color": colour if kind else FAINT},
                row=row,
                col=col,
            )


TOKENS = Drawing(
    title="Which tokens does each direction promote?",
    reading="Weights of the direction at the unembedding: what it says when it is read as an answer. A direction may "
    "act through later layers without promoting anything here.",
    needs={"tokens": COLUMNS},
    plot=_plot,
)
