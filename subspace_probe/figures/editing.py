"""Edits of an attribute by few features of a dictionary, between no edit and the supervised one."""

import plotly.graph_objects as go

from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.lines import last
from subspace_probe.figures.rows import Row, distinct, drawn, select, shown, two_digits
from subspace_probe.figures.theme import NULL, colours, end_labels, panels, rule

COLUMNS = (
    *("attribute", "dictionary", "features", "kind", "affine", "no_edit", "supervised", "removed"),
    "accuracy",
)
HOVER = (
    "%{fullData.name}, %{x} features<br>%{y:.2f} of the way, %{customdata[0]:.2f} of prompts"
    "<br>%{customdata[1]:.2f} of the reconstruction removed<extra></extra>"
)
DASHES = {"greedy": "solid", "aware": "dot"}


def _plot(report: Report) -> go.Figure:
    rows: list[Row] = list(report.tables["edits"].records())
    names = distinct(row["attribute"] for row in rows)
    told = [name for name in names if drawn(select(rows, attribute=name, dictionary="supervised"), "affine")]
    figure, places = panels([_title(select(rows, attribute=name)) for name in told or names[:1]], height=340)
    arms = [name for name in distinct(row["dictionary"] for row in rows) if name not in ("none", "supervised")]
    palette = colours(arms) | {"random": NULL}
    for name, place in zip(told, places, strict=False):
        ends: list[tuple[str, float, float, str]] = []
        rule(figure, place, y=0)
        rule(figure, place, y=1)
        for arm in arms:
            for kind, dash in DASHES.items():
                line = drawn(select(rows, attribute=name, dictionary=arm, kind=kind), "affine")
                # random dictionaries often lie on another line, which must show through
                _line(figure, place, line, arm, palette[arm], "dash" if (arm, dash) == ("random", "solid") else dash)
                if kind == "greedy" and (end := last(line, "features", "affine")):
                    ends.append((shown(arm), *end, palette[arm]))
        end_labels(figure, place, ends, (-0.1, 1.1))
    ticks = sorted({row["features"] for row in rows if row["features"]})
    figure.update_xaxes(title_text="features changed", tickmode="array", tickvals=ticks)
    if ticks:  # names of lines stand to the right of the panel, clear of its rules
        figure.update_xaxes(range=[ticks[0] - 0.02 * ticks[-1], 1.01 * ticks[-1]])
    figure.update_yaxes(range=[-0.1, 1.1])
    figure.update_yaxes(title_text="0: no edit, 1: supervised edit", col=1)
    if not told:
        note = "No attribute changes the most likely token, so no edit can be told from none."
        figure.add_annotation(text=note, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return figure


def _title(rows: list[Row]) -> str:
    """The attribute, and which rates the ends of the scale are."""
    row = rows[0]
    ends = f"no edit {two_digits(row['no_edit'])}, supervised {two_digits(row['supervised'])}"
    return f"{shown(row['attribute'])} ({ends})"


def _line(figure: go.Figure, place: tuple[int, int], rows: list[Row], name: str, colour: str, dash: str) -> None:
    points = sorted(rows, key=lambda row: row["features"])
    figure.add_scatter(
        x=[row["features"] for row in points],
        y=[row["affine"] for row in points],
        customdata=[[row["accuracy"], row["removed"]] for row in points],
        mode="lines+markers",
        name=f"{shown(name)}{', features chosen by meaning' if dash == 'dot' else ''}",
        hovertemplate=HOVER,
        line={"color": colour, "width": 2.5, "dash": dash},
        marker={"size": 6, "color": colour},
        row=place[0],
        col=place[1],
    )


EDITING = Drawing(
    title="How many features does it take to change an attribute?",
    reading="Share of prompts that answer as under the whole patch, on a scale from no edit to the supervised edit of "
    "two features. Solid: features chosen because they bring the state nearer; dotted: chosen by what they stand for.",
    needs={"edits": COLUMNS},
    plot=_plot,
)
