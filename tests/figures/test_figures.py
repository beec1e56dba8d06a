"""Every figure draws from its tables alone, the same from JSON, and says clearly when it cannot."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report, Table

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "layers",
    "separation",
    "strength",
    "nulls",
    "cosines",
    "guard",
    "baselines",
    "operating",
    "reliability",
    "tokens",
    "selection",
    "ladder",
    "searches",
    "illusion",
    "dormancy",
    "capacity",
    "patch_sweep",
    "seeds",
    "edits",
    "unlearning",
    "projection",
    "knob_layers",
    "knob_variants",
)
Only = Callable[..., "Report"]


def edited(table: "Table", **values: Any) -> "Table":
    """The table with these columns overwritten in every row."""
    from subspace_probe.core.reports import Table

    return Table.of([row | values for row in table.records()])


def drawn_alone(report: "Report", name: str) -> Any:
    from subspace_probe.figures import draw

    (found,) = draw(report).items()
    assert found[0] == name
    return found[1]


def texts(figure: Any) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_the_table_is_what_is_tested() -> None:
    from subspace_probe.figures import FIGURES

    assert tuple(FIGURES.table) == NAMES  # a new figure adds its tests by adding its name here


@pytest.mark.parametrize("name", NAMES)
def test_draws_from_its_tables_alone(name: str, only: Only) -> None:
    from subspace_probe.figures import FIGURES

    figure = drawn_alone(only(*FIGURES.load(name).needs), name)
    assert len(figure.data) > 0
    assert figure.layout.height > 200
    assert figure.layout.title.text == FIGURES.load(name).title
    assert figure.layout.template.layout.paper_bgcolor == "white"


@pytest.mark.parametrize("name", NAMES)
def test_is_the_same_from_json_and_leaves_the_report_alone(name: str, report: "Report") -> None:
    from subspace_probe.core.reports import Report
    from subspace_probe.figures import FIGURES

    before = report.to_json()
    drawing = FIGURES.load(name)
    assert drawing(Report.from_json(before)).to_json() == drawing(report).to_json() == drawing(report).to_json()
    assert report.to_json() == before


@pytest.mark.parametrize("name", NAMES)
def test_missing_or_empty_tables_leave_the_figure_out(name: str, report: "Report", only: Only) -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.reports import Table
    from subspace_probe.figures import FIGURES, draw

    needed = set(FIGURES.load(name).needs)
    other = next(other for other in NAMES if not needed & set(FIGURES.load(other).needs))
    without = only(*FIGURES.load(other).needs)
    assert other in draw(without)
    assert name not in draw(without)
    assert draw(only(**{table: Table.of([]) for table in needed})) == {}
    with pytest.raises(
        ConfigError,
        match=f"the table {next(iter(FIGURES.load(name).needs))!r}, which the report 'harmfulness' does not have",
    ):
        FIGURES.load(name)(without)


def test_no_tables_no_figures(only: Only) -> None:
    from subspace_probe.figures import draw

    assert draw(only()) == {}


def test_a_missing_column_is_named(report: "Report", only: Only) -> None:
    from subspace_probe.core.errors import UnknownName
    from subspace_probe.core.reports import Table
    from subspace_probe.figures import draw

    rows = [{("aurocs" if k == "auroc" else k): v for k, v in r.items()} for r in report.tables["guard"].records()]
    with pytest.raises(UnknownName, match=r"Unknown column of the table 'guard' 'auroc'. Did you mean 'aurocs'?"):
        draw(only(guard=Table.of(rows)))


def test_an_unknown_figure_is_named() -> None:
    from subspace_probe.core.errors import UnknownName
    from subspace_probe.figures import FIGURES

    with pytest.raises(UnknownName, match=r"Unknown figure 'layer'. Did you mean 'layers'"):
        FIGURES.load("layer")


def test_what_is_drawn_is_what_the_table_says(report: "Report", only: Only) -> None:
    line = report.tables["layers"].where(direction="harmfulness", position="t_inst")
    figure = drawn_alone(only("layers"), "layers")
    (trace,) = [t for t in figure.data if t.name == "t_inst" and t.xaxis == "x"]
    assert list(trace.y) == line.column("auroc")
    assert list(trace.x) == line.column("layer")
    assert [list(pair) for pair in trace.customdata] == [[r["low"], r["high"]] for r in line.records()]
    assert [text for text in texts(figure) if text.startswith("chosen: layer 2, 0.9")]


def test_gaps_stay_gaps(only: Only) -> None:
    figure = drawn_alone(only("layers"), "layers")
    (line,) = [t for t in figure.data if t.name == "t_inst" and t.xaxis == "x2"]
    (band,) = [t for t in figure.data if t.name == "t_inst, interval" and t.xaxis == "x2"]
    assert [y is None for y in line.y] == [False, False, False, True, False, False]
    assert [x for x in band.x if x is None] == [None, None]  # two outlines, one on each side of the gap


@pytest.mark.parametrize("name", NAMES)
def test_all_estimates_missing(name: str, report: "Report", only: Only) -> None:
    from subspace_probe.figures import FIGURES

    (source, *_) = FIGURES.load(name).needs
    table = report.tables[source]
    numbers = {
        column: math.nan
        for column in table.columns
        if column not in ("layer", "strength", "n", "rank") and isinstance(table.column(column)[-1], float)
    }
    assert numbers
    figure = drawn_alone(only(**{source: edited(table, **numbers)}), name)
    assert "NaN" not in figure.to_json()


def test_one_layer_and_one_direction(report: "Report", only: Only) -> None:
    one = report.tables["layers"].where(layer=2, direction="harmfulness")
    figure = drawn_alone(only(layers=one), "layers")
    assert tuple(figure.layout.xaxis.range) == (1.6, 2.4)
    assert "xaxis2" not in figure.to_plotly_json()["layout"]


def test_unknown_directions_get_colours_of_their_own(report: "Report", only: Only) -> None:
    from subspace_probe.core.reports import Table
    from subspace_probe.figures.theme import COLOURS, NULL

    rows = report.tables["strength"].records()
    more = [row | {"direction": name} for row in rows[:9] for name in ("context", "honesty", "intent")]
    figure = drawn_alone(only(strength=Table.of(rows + more)), "strength")
    used = {trace.name: trace.line.color for trace in figure.data if trace.mode == "lines+markers"}
    assert used["harmfulness"] == COLOURS["harmfulness"]
    assert used["random"] == NULL
    assert len({used[name] for name in ("context", "honesty", "intent", "harmfulness", "refusal", "random")}) == 6


def test_null_draws_that_are_all_equal_keep_a_visible_bin(report: "Report", only: Only) -> None:
    figure = drawn_alone(only(nulls=edited(report.tables["nulls"], value=0.0)), "nulls")
    assert {trace.xbins.size for trace in figure.data} == {0.02}
    assert tuple(figure.layout.xaxis.range) == (-0.03, 1.03)


def test_a_cell_without_prompts_says_so(report: "Report", only: Only) -> None:
    from subspace_probe.core.reports import Table

    kept = [
        row
        for row in report.tables["separation"].records()
        if (row["cell"], row["position"]) != ("harmless, refused", "t_inst")
    ]
    assert texts(drawn_alone(only(separation=Table.of(kept)), "separation")).count("no prompts") == 2


def test_cosines_not_measured_are_not_zero(only: Only) -> None:
    figure = drawn_alone(only("cosines"), "cosines")
    matrix = figure.data[0]
    assert sum(value is None for line in matrix.z for value in line) == 4
    assert matrix.z[0][2] == matrix.z[2][0] == 0.11
    assert "not computed" in texts(figure)


def test_markup_in_labels_is_shown_not_obeyed(only: Only) -> None:
    figure = drawn_alone(only("tokens"), "tokens")
    ticks = [*figure.layout.yaxis.ticktext, *figure.layout.yaxis2.ticktext]
    assert {"&lt;script&gt;", "&lt;b&gt;", "␣bad", "␣decline", "⏎", "(empty)"} <= set(ticks)
    assert not [tick for tick in ticks if "<" in tick]


def test_labels_are_spread_within_their_range() -> None:
    from subspace_probe.figures.rows import spread

    placed = spread([0.99, 0.98, 0.02, 1.0], gap=0.1, low=0.0, high=1.0)
    assert placed[2] == 0.02
    assert placed == pytest.approx([0.9, 0.8, 0.02, 1.0])
    assert spread([0.2, 0.8], gap=0.1, low=0.0, high=1.0) == [0.2, 0.8]
    assert spread([], gap=0.1, low=0.0, high=1.0) == []


def test_verdicts_and_meanings_have_colours_that_can_be_told_apart() -> None:
    from typing import get_args

    from subspace_probe.core.findings import Verdict
    from subspace_probe.figures.theme import COLOURS, VERDICTS

    assert tuple(VERDICTS) == get_args(Verdict)
    assert len({sign for sign, _ in VERDICTS.values()}) == len(VERDICTS)
    for together in (("harmfulness", "refusal", "random"), ("t_inst", "t_post_inst"), tuple(COLOURS)[-4:]):
        assert len({COLOURS[name] for name in together}) == len(together)


def test_importing_changes_no_global_template() -> None:
    program = "import plotly.io as pio; a = pio.templates.default, list(pio.templates)\n"
    program += "import subspace_probe.figures; assert a == (pio.templates.default, list(pio.templates))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plotly_loads_after_the_package() -> None:
    program = "import subspace_probe as sp; print(*sp.figures.draw(sp.Report('empty')))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_report_extended_by_another_draws_both(report: "Report", only: Only) -> None:
    from subspace_probe.figures import draw

    assert set(draw(only("layers") + replace(report, tables={"guard": report.tables["guard"]}))) == {"layers", "guard"}
