"""The guard beside what else would do: a bag of words, directions of other things, directions of nothing."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import distinct, drawn, select, shown, two_digits
from subspace_probe.figures.theme import COLOURS, FAINT, NULL, colours, panels

COLUMNS = ("slice", "baseline", "auroc", "low", "high", "tpr_1pct", "n")
OWN = {"guard": COLOURS["harmfulness"], "refusal_direction": COLOURS["refusal"], "random_direction": NULL}


def _plot(report: Report) -> go.Figure:
    rows = report.tables["baselines"].records()
    names = distinct(str(row["baseline"]) for row in rows)
    shades = colours(names) | {name: colour for name, colour in OWN.items() if name in names}
    slices = distinct(str(row["slice"]) for row in rows)
    figure, places = panels([shown(name) for name in slices], height=60 + 34 * len(names))
    for part, (row, col) in zip(slices, places, strict=True):
        for found in drawn(select(rows, slice=part), "auroc"):
            name = str(found["baseline"])
            level = names.index(name)
            if drawn([found], "low", "high"):
                figure.add_scatter(
                    x=[found["low"], found["high"]],
                    y=[level, level],
                    mode="lines",
                    hoverinfo="skip",
                    line={"color": shades[name], "width": 4},
                    opacity=0.45,
                    row=row,
                    col=col,
                )
            figure.add_scatter(
                x=[found["auroc"]],
                y=[level],
                mode="markers",
                marker={"size": 11, "color": shades[name], "symbol": "diamond" if name == "guard" else "circle"},
                hovertemplate=f"{shown(name)}, {shown(part)}<br>AUROC %{{x:.3f}} [{two_digits(found['low'])}, "
                f"{two_digits(found['high'])}]<br>found at 1 % false positives over all: "
                f"{two_digits(found['tpr_1pct'])}<br>{found['n']} prompts<extra></extra>",
                row=row,
                col=col,
            )
        figure.add_vline(x=0.5, line={"color": FAINT, "width": 1, "dash": "dot"}, row=row, col=col)  # pyright: ignore[reportArgumentType]
    least = min((float(row["low"]) for row in drawn(rows, "low")), default=0.5)
    figure.update_xaxes(title_text="AUROC", range=[min(0.45, least - 0.02), 1.02])
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=[shown(name.replace("_", " ")) for name in names],
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
    )
    return figure.update_layout(showlegend=False, margin={"l": 190})


BASELINES = Drawing(
    title="Does the guard do better than what is simpler?",
    reading="AUROC on the same prompts. For random directions the dot is the median and the bar the range of 95 % of "
    "them; where a bag of words reaches the guard, the prompts are told apart by their words.",
    needs={"baselines": COLUMNS},
    plot=_plot,
)
