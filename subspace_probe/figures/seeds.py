"""Seeds: what each run found, where the study expects it, and what the control gave."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.rows import Row, distinct, finite, shown
from subspace_probe.figures.theme import FAINT, NULL

COLUMNS = ("case", "seed", "finding", "estimate", "null_low", "null_high", "least", "most", "met")
SCALE = (-0.05, 1.05)
"""Only rates and shares share an axis; other findings stand in the table alone."""
MET, UNMET = "#0072B2", "#D55E00"


def _expected(report: Report) -> list[Row]:
    """The rows with an expectation whose values lie on the axis."""
    rows = [row for row in report.tables["seeds"].records() if _bounds(row)]
    off = {_name(row) for row in rows if not all(SCALE[0] <= value <= SCALE[1] for value in _values(row))}
    return [row for row in rows if _name(row) not in off]


def _bounds(row: Row) -> list[tuple[str, float]]:
    """Where the study expects the estimate: the sign and the number."""
    bounds = [("≥", finite(row["least"])), ("≤", finite(row["most"]))]
    return [(sign, bound) for sign, bound in bounds if bound is not None]


def _values(row: Row) -> list[float]:
    value = finite(row["estimate"])
    return [bound for _, bound in _bounds(row)] + ([] if value is None else [value])


def _name(row: Row) -> str:
    return f"{row['case']}.{row['finding']}" if row["case"] else str(row["finding"])


def _plot(report: Report) -> go.Figure:
    rows = _expected(report)
    names = distinct(_name(row) for row in rows)
    figure = go.Figure()
    for row in rows:  # what the control gives, behind the dots
        ends = [finite(row["null_low"]), finite(row["null_high"])]
        if None not in ends:
            look = {"mode": "lines", "line": {"color": NULL, "width": 9}, "opacity": 0.25}
            figure.add_scatter(x=ends, y=[names.index(_name(row))] * 2, **look, hoverinfo="skip", showlegend=False)
    for met, colour, symbol, label in ((True, MET, "circle", "met"), (False, UNMET, "x", "not met")):
        some = [row for row in rows if row["met"] is met]
        if some:
            figure.add_scatter(
                x=[row["estimate"] for row in some],
                y=[names.index(_name(row)) for row in some],
                mode="markers",
                name=label,
                marker={"color": colour, "symbol": symbol, "size": 10, "opacity": 0.75},
                customdata=[[shown(_name(row)), row["seed"]] for row in some],
                hovertemplate="%{customdata[0]}<br>seed %{customdata[1]}: %{x:.3f}<extra></extra>",
            )
    for level, name in enumerate(names):
        for sign, bound in _bounds(next(row for row in rows if _name(row) == name)):
            stroke = {"x0": bound, "x1": bound, "y0": level - 0.38, "y1": level + 0.38}
            figure.add_shape(type="line", **stroke, line={"color": FAINT, "width": 2})
            look = {"xref": "paper", "xanchor": "left", "xshift": 10, "font": {"color": FAINT}}
            figure.add_annotation(text=f"{sign} {bound:g}", x=1, y=level, showarrow=False, **look)
    figure.update_xaxes(title_text="estimate", range=list(SCALE))
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=[shown(name, longest=52) for name in names],
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
    )
    return figure.update_layout(height=26 * len(names) + 170, margin={"r": 90, "l": 330})


SEEDS = Drawing(
    title="Do the seeds agree, and are they where they are expected?",
    reading="One mark a run; the stroke is what the study expects, the grey band what the control gives. Findings on "
    "other scales than 0 to 1 stand in the table only.",
    needs={"seeds": COLUMNS},
    plot=_plot,
)
