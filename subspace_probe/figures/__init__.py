"""Figures: a `Report` in, plotly figures and one self-contained page out. They draw; they compute nothing.

So a figure can be drawn again from a report's JSON, years later, without the model:

    sp.figures.draw(sp.Report.load("report.json"))["layers"].show()

To add one, write a file with a `Drawing` and add a line to `FIGURES`.
"""

from pathlib import Path

import plotly.graph_objects as go

from subspace_probe.core.files import atomic
from subspace_probe.core.registry import Registry
from subspace_probe.core.reports import Report
from subspace_probe.figures.drawing import Drawing
from subspace_probe.figures.html import page

__all__ = ["FIGURES", "Drawing", "draw", "save_html"]

FIGURES = Registry(
    "figure",
    {
        "layers": "subspace_probe.figures.layers:LAYERS",
        "separation": "subspace_probe.figures.separation:SEPARATION",
        "strength": "subspace_probe.figures.strength:STRENGTH",
        "nulls": "subspace_probe.figures.nulls:NULLS",
        "cosines": "subspace_probe.figures.cosines:COSINES",
        "guard": "subspace_probe.figures.guard:GUARD",
        "baselines": "subspace_probe.figures.baselines:BASELINES",
        "operating": "subspace_probe.figures.operating:OPERATING",
        "reliability": "subspace_probe.figures.reliability:RELIABILITY",
        "tokens": "subspace_probe.figures.tokens:TOKENS",
        "selection": "subspace_probe.figures.selection:SELECTION",
        "ladder": "subspace_probe.figures.ladder:LADDER",
        "searches": "subspace_probe.figures.searches:SEARCHES",
        "illusion": "subspace_probe.figures.illusion:ILLUSION",
        "dormancy": "subspace_probe.figures.dormancy:DORMANCY",
        "capacity": "subspace_probe.figures.capacity:CAPACITY",
        "patch_sweep": "subspace_probe.figures.heatmap:HEATMAP",
        "seeds": "subspace_probe.figures.seeds:SEEDS",
        "edits": "subspace_probe.figures.editing:EDITING",
        "unlearning": "subspace_probe.figures.unlearning:UNLEARNING",
        "projection": "subspace_probe.figures.projection:PROJECTION",
        "knob_layers": "subspace_probe.figures.knob:KNOB_LAYERS",
        "knob_variants": "subspace_probe.figures.knob:KNOB_VARIANTS",
    },
    group="subspace_probe.figures",
)


def draw(report: Report) -> dict[str, go.Figure]:
    """Every figure whose tables the report has, by name.

    Raises:
        UnknownName: a table lacks a column that its figure reads.
    """
    return {name: drawing(report) for name, drawing in _drawable(report).items()}


def save_html(report: Report, path: str | Path) -> Path:
    """Write the report as one self-contained page: no network, and its data inside. Whole or not at all.

    Raises:
        StoreError: the place cannot be written.
        UnknownName: a table lacks a column that its figure reads.
    """
    text = page(report, _drawable(report))
    with atomic(Path(path)) as partial:
        # Half a surrogate pair, which a model can generate, has no UTF-8: it becomes a character reference.
        partial.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    return Path(path)


def _drawable(report: Report) -> dict[str, Drawing]:
    drawings: dict[str, Drawing] = {name: FIGURES.load(name) for name in FIGURES}
    return {name: drawing for name, drawing in drawings.items() if drawing.drawable(report)}
