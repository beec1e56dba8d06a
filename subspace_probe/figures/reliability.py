"""Whether the guard's probabilities mean what they say: how often it happened against how sure it was."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import drawn, two_digits
from subspace_probe.figures.theme import COLOURS, FAINT

COLUMNS = ("bin", "confidence", "frequency", "n", "low", "high")


def _plot(report: Report) -> go.Figure:
    rows = drawn(report.tables["reliability"].records(), "confidence", "frequency")
    colour = COLOURS["harmfulness"]
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", hoverinfo="skip", line={"color": FAINT, "width": 1, "dash": "dot"}
    )
    for row in drawn(rows, "low", "high"):
        figure.add_scatter(
            x=[row["confidence"]] * 2,
            y=[row["low"], row["high"]],
            mode="lines",
            hoverinfo="skip",
            line={"color": colour, "width": 4},
            opacity=0.45,
        )
    figure.add_scatter(
        x=[row["confidence"] for row in rows],
        y=[row["frequency"] for row in rows],
        mode="markers",
        marker={"size": 9, "color": colour},
        customdata=[[row["n"], two_digits(row["low"]), two_digits(row["high"])] for row in rows],
        hovertemplate="said %{x:.3f}, happened %{y:.3f} [%{customdata[1]}, %{customdata[2]}]"
        "<br>%{customdata[0]} prompts<extra></extra>",
    )
    figure.add_annotation(x=0.5, y=0.5, text="exactly right", showarrow=False, xshift=46, yshift=-10, font_color=FAINT)
    figure.update_xaxes(title_text="probability that the guard states", range=[-0.03, 1.03])
    figure.update_yaxes(title_text="share that is positive", range=[-0.03, 1.03])
    return figure.update_layout(height=460, width=560, showlegend=False)


RELIABILITY = Drawing(
    title="Do the guard's probabilities mean what they say?",
    reading="Each point is a bin of prompts with similar probabilities, as many in each; below the line the guard is "
    "too sure that prompts are positive, above it not sure enough.",
    needs={"reliability": COLUMNS},
    plot=_plot,
    findings=("ece", "brier"),
)
