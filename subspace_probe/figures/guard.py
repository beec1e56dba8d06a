"""The guard: how well harmfulness is read from the state at the instruction, under each framing."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import drawn, finite, shown, two_digits
from subspace_probe.figures.theme import COLOURS, FAINT

COLUMNS = ("framing", "auroc", "low", "high", "n")


def _plot(report: Report) -> go.Figure:
    rows = report.tables["guard"].records()
    colour = COLOURS["harmfulness"]
    figure = go.Figure()
    for level, row in enumerate(rows):
        if drawn([row], "low", "high"):
            figure.add_scatter(
                x=[row["low"], row["high"]],
                y=[level, level],
                mode="lines",
                hoverinfo="skip",
                line={"color": colour, "width": 4},
                opacity=0.45,
            )
        if drawn([row], "auroc"):
            span = f" [{two_digits(row['low'])}, {two_digits(row['high'])}]"
            figure.add_scatter(
                x=[row["auroc"]],
                y=[level],
                mode="markers",
                marker={"size": 13, "color": colour},
                hovertemplate=f"{shown(row['framing'])}<br>AUROC %{{x:.3f}}{span}<br>{row['n']} prompts<extra></extra>",
            )
            text = f"<b>{row['auroc']:.3f}</b>{span}  n = {row['n']}"
        else:
            text = f"n/a  n = {row['n']}"
        figure.add_annotation(text=text, x=1, xref="paper", xanchor="left", xshift=14, y=level, showarrow=False)
    figure.add_vline(
        x=0.5,
        line={"color": FAINT, "width": 1, "dash": "dot"},
        annotation={"text": "chance", "yanchor": "bottom", "y": 1, "font": {"color": FAINT}},
    )
    values = [value for row in rows for name in ("auroc", "low") if (value := finite(row[name])) is not None]
    figure.update_xaxes(title_text="AUROC, held-out prompts", range=[min([0.48, *(v - 0.02 for v in values)]), 1.01])
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(rows))),
        # a framing is one word; other slices come with their own words
        ticktext=[
            shown(name) if " " in name else f"{shown(name)} framing" for name in (row["framing"] for row in rows)
        ],
        range=[len(rows) - 0.4, -0.6],
        showgrid=False,
    )
    return figure.update_layout(height=60 * len(rows) + 150, showlegend=False, margin={"r": 220, "l": 120})


GUARD = Drawing(
    title="Does the guard hold when the framing changes?",
    reading="AUROC of harmful against harmless prompts, read at the instruction before the model answers; a guard "
    "worth having is as good under a jailbreak as on plain requests.",
    needs={"guard": COLUMNS},
    plot=_plot,
)
