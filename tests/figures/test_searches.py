"""The figure of searches by budget draws its table and nothing else."""

from typing import Any


def rows() -> list[dict[str, Any]]:
    return [
        {"search": search, "unit": unit, "budget": budget, "flipped": share, "low": share / 2, "high": 1.0, "n": 8}
        for search, shares in (("target", (0.5, 1.0)), ("random", (0.0, 0.25)))
        for unit in ("rows", "layer-forwards")
        for budget, share in zip((80, 160), shares, strict=True)
    ]


def test_lines_are_the_rows_of_the_table() -> None:
    from subspace_probe.core.reports import Report, Table
    from subspace_probe.figures.searches import SEARCHES

    report = Report("searches", tables={"curve": Table.of(rows())})
    figure: Any = SEARCHES(report)
    lines = {(trace.name, trace.xaxis): list(trace.y) for trace in figure.data if trace.hovertemplate}
    assert lines == {
        ("target", "x"): [0.5, 1.0], ("target", "x2"): [0.5, 1.0],
        ("random", "x"): [0.0, 0.25], ("random", "x2"): [0.0, 0.25],
    }  # fmt: skip
    assert SEARCHES(Report.from_json(report.to_json())).to_json() == figure.to_json()
