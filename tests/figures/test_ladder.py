"""The ladder's figure draws its table and nothing else."""

from typing import TYPE_CHECKING, Any

from tests.figures.conftest import LEVELS, ladder_rows

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report


def report_of(rows: list[dict[str, Any]]) -> "Report":
    from subspace_probe.core.reports import Report, Table

    return Report("ladder", tables={"ladder": Table.of(rows)})


def test_bars_are_the_rows_of_the_table() -> None:
    from subspace_probe.figures.ladder import LADDER

    figure: Any = LADDER(report_of(ladder_rows()))
    assert len(figure.data) == 2 * 2 * 3
    bars = [trace for trace in figure.data if trace.xaxis == "x4" and trace.name == "rerouted"]
    assert [list(bar.x) for bar in bars] == [list(LEVELS)]
    assert list(bars[0].y) == [1.0, 0.8, 0.0]
    assert [round(v, 3) for v in bars[0].error_y.arrayminus] == [0.1, 0.1, 0.0]
    assert sum(bool(trace.showlegend) for trace in figure.data) == 3
    shown = [annotation.text for annotation in figure.layout.annotations]
    assert "L2.&lt;b&gt;resid_post&lt;/b&gt;: target met" in shown
    assert figure.layout.title.text == LADDER.title


def test_gaps_are_left_out_and_json_draws_the_same() -> None:
    from subspace_probe.core.reports import Report
    from subspace_probe.figures.ladder import LADDER

    report = report_of(ladder_rows())
    figure: Any = LADDER(report)
    first = next(trace for trace in figure.data if trace.xaxis == "x" and trace.name == "random")
    assert list(first.x) == ["embedding", "token"]
    assert LADDER(Report.from_json(report.to_json())).to_json() == figure.to_json()
