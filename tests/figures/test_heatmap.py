"""The heat map shows the numbers of its table, in their places."""

import math
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report


def made(*, heads: int = 0, positions: int = 3, missing: bool = False) -> "Report":
    from subspace_probe.core.reports import Report, Table

    rows: list[dict[str, Any]] = []
    for stream in ("z",) if heads else ("resid_pre", "mlp_out"):
        for layer in (0, 2):
            for order in range(positions):
                for head in range(heads) if heads else (None,):
                    effect = 0.1 * layer + 0.01 * order - 0.001 * (head or 0)
                    effect = math.nan if missing and order == 1 else effect
                    place = {"stream": stream, "layer": layer, "position": f"last-{order}", "order": order}
                    rows.append(place | {"token": "<b>", "head": head, "patched": 1.0, "effect": effect})
    return Report("patch_sweep", tables={"patch_sweep": Table.of(rows)})


def drawn(report: "Report") -> Any:
    from subspace_probe.figures.heatmap import HEATMAP

    return HEATMAP(report)


def test_every_cell_is_where_its_row_says() -> None:
    figure = drawn(made())
    assert [note.text for note in figure.layout.annotations] == ["resid_pre", "mlp_out"]
    for panel in figure.data:
        assert list(panel.y) == [0, 2]
        assert list(panel.x) == [0, 1, 2]
        assert [value for line in panel.z for value in line] == pytest.approx([0.0, 0.01, 0.02, 0.2, 0.21, 0.22])
    labels = figure.layout.xaxis.ticktext
    assert labels[1] == "last-1 &lt;b&gt;"  # markup in a token is shown
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == 1.0  # white is nothing


def test_heads_get_panels_of_the_strongest_positions() -> None:
    figure = drawn(made(heads=4, positions=12))
    assert len(figure.data) == 8
    assert [note.text.split()[3] for note in figure.layout.annotations] == [f"last-{i}" for i in range(4, 12)]
    assert list(figure.data[0].x) == [0, 1, 2, 3]
    assert figure.data[0].z[1][3] == pytest.approx(0.2 + 0.04 - 0.003)


def test_gaps_stay_gaps_and_json_changes_nothing() -> None:
    from subspace_probe.core.reports import Report

    report = made(missing=True)
    figure = drawn(Report.from_json(report.to_json()))
    assert figure.data[0].z[0][1] is None
    assert figure.to_dict() == drawn(report).to_dict()
