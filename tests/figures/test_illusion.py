"""The figures of an audit: their tables equal naive sums over what was run, and they draw those tables from JSON."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report

PARTS = ["subspace", "read part", "unread part", "both parts", "read part, not rescaled", "whole L2.resid_post"]


@pytest.fixture(scope="module")
def examined(chat) -> Any:
    """An audit on mechanism of refusal in `chat`, with the numbers behind it."""
    import subspace_probe as sp
    from subspace_probe.diagnostics.auditing import examine
    from subspace_probe.diagnostics.capacity import Capacity
    from subspace_probe.diagnostics.clamp import Clamp
    from subspace_probe.diagnostics.containment import Containment
    from subspace_probe.diagnostics.dormancy import Dormancy
    from subspace_probe.diagnostics.exchange import Exchange
    from subspace_probe.diagnostics.random_controls import RandomControls
    from subspace_probe.diagnostics.reader_split import ReaderSplit

    requests = sp.load_contrast("organism:chat/requests", split="test", n=48).where(framing=0)
    acts = chat.capture(requests, sites=sp.Site(2), where=sp.T_POST_INST)
    steer = sp.Steer(sp.MeanDifference(null_draws=0).fit(acts, sp.Site(2)), where=sp.T_POST_INST)
    checks = [RandomControls(draws=4), Exchange(draws=8), Containment(), ReaderSplit(), Dormancy(), Clamp(), Capacity()]
    return examine(chat, steer, requests, "refusal_score", checks=checks, natural=requests, pairs=8)


def again(report: "Report") -> "Report":
    from subspace_probe.core.reports import Report

    return Report.from_json(report.to_json())


def test_the_illusion_table_is_what_the_runs_gave(examined) -> None:
    pairs, values = examined.case.pairs, examined.values
    rows = examined.report.tables["illusion"].records()
    clean, half, n = pairs.clean.tolist(), len(pairs) // 2, len(pairs)
    partner = [clean[(i + half) % n] for i in range(n)]

    def share(run: Any) -> float:
        sign = [1 if i < half else -1 for i in range(n)]
        return sum(s * (float(v) - c) for s, v, c in zip(sign, run, clean, strict=True)) / sum(
            s * (p - c) for s, p, c in zip(sign, partner, clean, strict=True)
        )

    def flipped(run: Any) -> float:
        nearer = [abs(float(v) - p) < abs(float(v) - c) for v, p, c in zip(run, partner, clean, strict=True)]
        return sum(nearer) / n

    runs = [values["exchange"][0], *values["reader_split"][1:], *values["containment"][1:]]
    observed = [row for row in rows if row["kind"] == "observed"]
    assert [row["part"] for row in observed][: len(PARTS)] == PARTS
    for row, run in zip(observed, runs, strict=True):
        assert row["value"] == pytest.approx(share(run), abs=1e-9), row
        assert row["flips"] == pytest.approx(flipped(run), abs=1e-9), row
        assert row["low"] <= row["value"] + 1e-9
        assert row["value"] <= row["high"] + 1e-9
    null = [row for row in rows if row["kind"] == "null"]
    assert [row["value"] for row in null] == pytest.approx([share(run) for run in values["exchange"][1:-1]], abs=1e-9)
    assert len(null) == 8
    by_part = {row["part"]: row["value"] for row in observed}
    assert by_part["subspace"] > 0.8  # what the table is about: it works, and the part that nobody reads does not
    assert abs(by_part["unread part"]) < 0.1


def test_the_dormancy_table_holds_projections(examined) -> None:
    import numpy as np

    pairs = examined.case.pairs
    row = pairs.read_space.split(examined.case.subspace).row[0].numpy()
    states = pairs.base.double().numpy() @ row
    rows = examined.report.tables["dormancy"].records()
    assert len(rows) == 2 * len(pairs)
    unit = examined.case.subspace.basis[0].double().numpy()
    moved = (pairs.source - pairs.base).double().numpy() @ unit * (unit @ row)
    for state, expected in (("natural", states), ("patched", states + moved)):
        for label in (0, 1):
            own = label if state == "natural" else 1 - label  # a patched state imitates its partner's class
            found = sorted(r["value"] for r in rows if r["state"] == state and r["label"] == label)
            assert found == pytest.approx(sorted(expected[pairs.row_labels.numpy() == own].tolist()), abs=1e-5)
    low, high = np.quantile(states, [0.001, 0.999])
    assert [(r["low"], r["high"]) for r in rows] == [(pytest.approx(low), pytest.approx(high))] * len(rows)


def test_long_tables_are_sampled(examined) -> None:
    from subspace_probe.diagnostics import panels

    case, values = examined.case, examined.values
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(panels, "POINTS", 12)
        few, same = panels.dormancy_rows(case, values), panels.dormancy_rows(case, values)
    every = panels.dormancy_rows(case, values)
    assert few == same
    assert len(few) == 12
    assert all(row in every for row in few)


def test_the_capacity_table_is_the_closed_form(examined) -> None:
    pairs = examined.case.pairs
    rows = {(r["patch"], r["kind"]): r["value"] for r in examined.report.tables["capacity"].records()}
    bound, whole = 0.0, 0.0
    for d, g in zip(pairs.difference.double(), pairs.path_gradients.double(), strict=True):
        bound += float(torch.linalg.eigvalsh((d[:, None] * g + g[:, None] * d) / 2)[-1]) / len(pairs)
        whole += float(d @ g) / len(pairs)
    assert rows["best direction of each pair", "first order"] == pytest.approx(bound, rel=1e-6)
    assert rows["whole state", "first order"] == pytest.approx(whole, rel=1e-6)
    assert rows["whole state", "first order"] <= rows["best direction of each pair", "first order"]
    assert rows["subspace", "run"] == pytest.approx(examined.report.finding("mechanism.exchange").estimate)


def test_checks_that_did_not_run_have_no_rows(examined) -> None:
    from subspace_probe.diagnostics.panels import tables_of

    case = examined.case
    assert tables_of(case, {}) == {}
    assert set(tables_of(case, {"dormancy": torch.empty(0, len(case.pairs))})) == {"dormancy"}
    assert tables_of(replace(case, natural=None), examined.values) == {}


def test_figures_draw_from_json_what_the_tables_say(examined) -> None:
    from subspace_probe.figures import draw

    report = examined.report
    drawn, redrawn = draw(report), draw(again(report))
    assert set(drawn) == {"illusion", "dormancy", "capacity"}
    for name, figure in drawn.items():
        assert figure.to_json() == redrawn[name].to_json()
    points: Any = [t for t in drawn["illusion"].data if t.mode == "markers" and len(t.x) == 1 and t.xaxis == "x"]
    observed = [row["value"] for row in report.tables["illusion"].where(kind="observed").records()]
    assert [float(t.x[0]) for t in points] == pytest.approx(observed)
    clouds: Any = [t for t in drawn["illusion"].data if t.name == "random subspaces"]
    assert [len(t.x) for t in clouds] == [8, 8]
    states: Any = drawn["dormancy"].data
    assert sum(len(t.x) for t in states) == len(report.tables["dormancy"].rows)
    bars: Any = {(y, t.name): x for t in drawn["capacity"].data for y, x in zip(t.y, t.x, strict=True)}
    assert bars == {(r["patch"], r["kind"]): r["value"] for r in report.tables["capacity"].records()}


def test_gaps_are_left_out(examined) -> None:
    """A number that JSON lost is not drawn as one."""
    from subspace_probe.core.reports import Table
    from subspace_probe.figures import draw

    report = examined.report
    rows = report.tables["illusion"].records()
    broken = [row | {"value": None, "low": None} if row["part"] == "subspace" else row for row in rows]
    figure: Any = draw(replace(report, tables={"illusion": Table.of(broken)}))["illusion"]
    left = [t for t in figure.data if t.name == "subspace"]
    assert {t.xaxis for t in left} == {"x2"}


def test_the_page_says_both_verdicts_and_what_the_findings_say(examined, tmp_path: Path) -> None:
    from subspace_probe.figures import save_html

    text = save_html(examined.report, tmp_path / "audit.html").read_text(encoding="utf-8")
    assert text.index("Control") < text.index("Mechanism") < text.index('id="findings"')
    assert "Is the subspace what the model itself uses?" in text
    assert "score" not in text[text.index('id="verdicts"') : text.index('id="findings"')]
    body = text[text.index('id="figure-dormancy"') : text.index('id="figure-capacity"')]
    assert examined.report.finding("mechanism.dormancy").note.split(" (")[0] in body
    assert 'id="cost"' in text
    bare = replace(examined.report, findings=examined.report.findings[2:])
    assert 'id="verdicts"' not in save_html(bare, tmp_path / "bare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({}, ()),
        ({"exchange": "not tested"}, ()),
        ({"exchange": "refuted", "dormancy": "refuted"}, ("agree here",)),
        ({"exchange": "supported", "dormancy": "supported"}, ("None of the signs",)),
        (
            {"exchange": "supported", "containment": "refuted", "dormancy": "refuted"},
            ("Makelov, Lange & Nanda (2023): the whole component does not", "Wu et al. (2024)", "moves 90%"),
        ),
    ],
)
def test_both_sides_of_the_dispute_where_they_differ(verdicts: dict[str, Any], expected: tuple[str, ...]) -> None:
    from subspace_probe.core.findings import Finding
    from subspace_probe.core.reports import Report
    from subspace_probe.figures.illusion import dispute

    findings = tuple(Finding(f"mechanism.{name}", "", 0.9, verdict=verdict) for name, verdict in verdicts.items())
    said = " ".join(dispute(Report("audit", findings)))
    assert bool(said) == bool(expected)
    assert [part for part in expected if part not in said] == []
