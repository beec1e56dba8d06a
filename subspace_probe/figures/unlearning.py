"""Unlearning: what each arm leaves of the topic, of everything else, and after a few facts are taught again."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import distinct, drawn, finite, select, shown
from subspace_probe.figures.theme import INK, NULL, panels, translucent

COLUMNS = ("measure", "arm", "value", "low", "high", "null_low", "null_high")
MEASURES = {
    "forget_accuracy": "topic: answers still given",
    "forget_ranked": "topic: answer ahead of the others",
    "relearned": "topic: untaught facts after relearning",
    "retain_change": "the rest: change of accuracy",
}


def _plot(report: Report) -> go.Figure:
    rows = report.tables["arms"].records()
    names = distinct(row["arm"] for row in rows)
    known = [measure for measure in MEASURES if drawn(select(rows, measure=measure), "value")]
    known = known or [*MEASURES][:1]  # empty axes, where nothing could be measured
    figure, places = panels([MEASURES[measure] for measure in known], height=60 + 40 * len(names))
    for measure, (row, col) in zip(known, places, strict=True):
        for one in drawn(select(rows, measure=measure), "value"):
            name, value = shown(one["arm"]), float(one["value"])
            low, high = (finite(one[end]) for end in ("null_low", "null_high"))
            if low is not None and high is not None:
                line = {"color": translucent(NULL, 0.35), "width": 16}
                ends = {"x": [low, high], "y": [name, name], "mode": "lines", "hoverinfo": "skip"}
                figure.add_scatter(**ends, line=line, row=row, col=col)
            below, above = (0.0 if (end := finite(one[edge])) is None else abs(value - end) for edge in ("low", "high"))
            error = {"type": "data", "symmetric": False, "array": [above], "arrayminus": [below], "color": INK}
            figure.add_scatter(
                x=[value],
                y=[name],
                mode="markers",
                marker={"size": 9, "color": "#0072B2"},
                error_x={**error, "thickness": 1.5, "width": 4},
                hovertemplate=f"{name}<br>%{{x:.3f}}<extra></extra>",
                row=row,
                col=col,
            )
        figure.update_xaxes(range=[-0.16, 0.06] if measure == "retain_change" else [-0.03, 1.03], row=row, col=col)
    figure.update_yaxes(categoryorder="array", categoryarray=[shown(name) for name in names][::-1], showgrid=False)
    return figure


UNLEARNING = Drawing(
    title="What does each way of unlearning leave?",
    reading="Of the topic, less is better, and of the rest, no change; grey is what a model scores that never knew the "
    "topic. What comes back after relearning was suppressed, not erased.",
    needs={"arms": COLUMNS},
    plot=_plot,
)
