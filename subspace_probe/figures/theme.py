"""How figures look: one template, and one colour for each meaning, the same in every figure.

The palette is Okabe and Ito's, which people with any of the common colour deficiencies can tell apart. No figure relies
on colour alone: series also differ by dash, marker or label.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from subspace_probe.core.findings import Verdict
from subspace_probe.figures.rows import distinct, spread

INK, FAINT, GRID, NULL = "#24292f", "#6e7781", "#e7eaee", "#8c959f"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"

COLOURS: Mapping[str, str] = {
    "harmfulness": "#D55E00",
    "refusal": "#0072B2",
    "random": NULL,
    "random direction": NULL,
    "permuted labels": "#56B4E9",
    "t_inst": INK,
    "t_post_inst": "#CC79A7",
    "harmful, refused": "#D55E00",
    "harmful, complied": "#E69F00",
    "harmless, refused": "#009E73",
    "harmless, complied": "#56B4E9",
}
"""The colour of each meaning."""

OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
"""For meanings without a colour of their own, in order of appearance."""

VERDICTS: Mapping[Verdict, tuple[str, str]] = {
    "supported": ("✓", "#00785a"),
    "refuted": ("✕", "#b34700"),
    "inconclusive": ("?", "#8a5a00"),
    "not tested": ("–", "#57606a"),  # noqa: RUF001  (a dash)
    "unaudited": ("○", "#57606a"),
}
"""The sign and the colour of each verdict."""

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": list(COLOURS.values()),
        "title": {
            **{"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
            **{"pad": {"l": 12, "t": 16}, "font": {"size": 17}},
        },
        "margin": {"l": 64, "r": 24, "t": 84, "b": 56},
        "hoverlabel": {"bgcolor": "white", "bordercolor": GRID, "font": {"family": FONT, "size": 13, "color": INK}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 0.01,
            "yref": "container",
            "yanchor": "bottom",
            "font": {"size": 13},
        },
        **{
            f"{axis}axis": {
                "gridcolor": GRID,
                "linecolor": NULL,
                "showline": axis == "x",
                "ticks": "outside" if axis == "x" else "",
                "tickcolor": NULL,
                "ticklen": 4,
                "zeroline": False,
                "automargin": True,
                "title": {"standoff": 8, "font": {"size": 13, "color": FAINT}},
            }
            for axis in "xy"
        },
    }
)
Place = tuple[int, int]


def dressed(figure: go.Figure, title: str) -> go.Figure:
    """The figure in the package's template, under its title."""
    return figure.update_layout(template=TEMPLATE, title_text=title)


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: its own where it has a meaning, one of the others where it has none."""
    known = distinct(names)
    strangers = [name for name in known if name not in COLOURS]
    spare = {name: OTHERS[index % len(OTHERS)] for index, name in enumerate(strangers)}
    return {name: COLOURS.get(name, spare.get(name, NULL)) for name in known}


def translucent(colour: str, alpha: float) -> str:
    """A hex colour with an opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def panels(
    titles: Sequence[str], *, across: int = 2, height: int = 300, legend: bool = False, **options: Any
) -> tuple[go.Figure, list[Place]]:
    """Small multiples that share their axes: the figure, and the row and column of each panel.

    Args:
        titles: one a panel.
        across: panels in a row, at most.
        height: of one panel, in pixels.
        legend: whether to leave room below for one.
        options: for `make_subplots`.
    """
    columns = min(across, len(titles))
    rows = -(-len(titles) // columns)
    total = rows * height + (160 if legend else 120)
    shared: dict[str, Any] = {"shared_yaxes": True, "horizontal_spacing": 0.14 if columns > 1 else 0.0}
    shared |= {"vertical_spacing": min(0.9 / rows, 102 / total)}
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=list(titles), **(shared | options))
    figure.update_annotations(font_size=14)
    figure.update_layout(height=total, showlegend=legend, margin_b=96 if legend else 56)
    return figure, [(index // columns + 1, index % columns + 1) for index in range(len(titles))]


def end_labels(
    figure: go.Figure, place: Place, ends: Sequence[tuple[str, float, float, str]], limits: tuple[float, float]
) -> None:
    """Name each line at its right end, moved apart where they would overlap.

    Args:
        figure: the figure to add to.
        place: row and column of the panel.
        ends: of each line its text, x, y and colour.
        limits: the range of y.
    """
    low, high = limits
    figure.update_layout(margin_r=max([24, *(22 + 8 * len(text) for text, *_ in ends)]))
    heights = spread([y for _, _, y, _ in ends], 0.085 * (high - low), low, high)
    for (text, x, _, colour), y in zip(ends, heights, strict=True):
        figure.add_annotation(
            text=text,
            x=x,
            y=y,
            xanchor="left",
            xshift=8,
            showarrow=False,
            font={"color": colour, "size": 13},
            row=place[0],
            col=place[1],
        )


def rule(
    figure: go.Figure,
    place: Place,
    *,
    x: float | int | None = None,
    y: float | int | None = None,
    color: str = FAINT,
    width: int = 1,
    dash: str = "dot",
) -> None:
    """A straight line through a whole panel: upright at `x`, or level at `y`."""
    upright = {"x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "y domain"}
    level = {"x0": 0, "x1": 1, "y0": y, "y1": y, "xref": "x domain"}
    line = {"color": color, "width": width, "dash": dash}
    figure.add_shape(type="line", line=line, row=place[0], col=place[1], **(level if x is None else upright))
