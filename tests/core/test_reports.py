"""Reports come back from JSON as they were, and their JSON is strict."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report


def report() -> "Report":
    from subspace_probe.core.findings import Expectation, Finding, Interval
    from subspace_probe.core.reports import Provenance, Report, Table

    findings = (
        Finding("rate", "it is high", 0.25, Interval(0.1, 0.4, 0.9, "prompts"), None, 12, "supported"),
        Finding("cosine", "it is nothing", math.nan, null=Interval(-0.1, math.nan), expected=Expectation(above=0.5)),
    )
    table = Table.of([{"layer": 0, "value": 1.5, "name": "é"}, {"layer": 1, "value": None, "name": "<b>"}], "layers")
    source = Provenance.now(model="tiny", config={"n": 3, "sites": ["L1"]}, given=("n",), seed=4)
    return Report("demo", findings, {"curve": table}, source)


def test_a_round_trip_through_json(tmp_path: Path) -> None:
    from subspace_probe.core.reports import Report

    made = report()
    for read in (Report.from_json(made.to_json()), Report.load(made.save(tmp_path / "new" / "report.json"))):
        assert read.to_json() == made.to_json()
        assert read.findings[0] == made.findings[0]
        assert (read.tables, read.provenance, read.study) == (made.tables, made.provenance, made.study)
        cosine = read.finding("cosine")
        assert math.isnan(cosine.estimate)
        assert cosine.null is not None
        assert math.isnan(cosine.null.high)
        assert cosine.expected == made.findings[1].expected
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.json"]


def test_the_json_is_strict_and_plain() -> None:
    from dataclasses import replace

    from subspace_probe.core.reports import Table

    def refuse(token: str) -> None:
        raise AssertionError(token)

    rows = ((np.float32(0.5), np.int64(3), math.inf, -math.inf, np.nan, Path("a/b"), (1, np.bool_(True))),)
    made = replace(report(), tables={"odd": Table(tuple("abcdefg"), rows)})
    body = json.loads(made.to_json(), parse_constant=refuse)
    assert body["tables"]["odd"]["rows"] == [[0.5, 3, None, None, None, "a/b", [1, True]]]
    assert body["findings"][0] == {
        "name": "rate",
        "claim": "it is high",
        "estimate": 0.25,
        "interval": {"low": 0.1, "high": 0.4, "level": 0.9, "of": "prompts"},
        "null": None,
        "n": 12,
        "verdict": "supported",
        "expected": None,
        "note": "",
        "met": True,
    }
    assert body["findings"][1]["estimate"] is None
    assert body["findings"][1]["met"] is False
    with pytest.raises(TypeError):
        replace(made, tables={"bad": Table(("a",), ((object(),),))}).to_json()


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    from subspace_probe.core.errors import StoreError
    from subspace_probe.core.reports import Report

    body = json.loads(report().to_json())
    for text, why in [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "expected format"),
        ('{"format": "other"}', "expected format"),
        (json.dumps({k: v for k, v in body.items() if k != "tables"}), "damaged report: KeyError"),
        (json.dumps(body | {"findings": [{}]}), "damaged report"),
        (json.dumps(body | {"findings": 3}), "damaged report"),
        (json.dumps(body | {"provenance": {"given": [], "new": 1}}), "damaged report"),
    ]:
        with pytest.raises(StoreError, match=why):
            Report.from_json(text)
    with pytest.raises(StoreError, match="No report at"):
        Report.load(tmp_path / "none.json")
    with pytest.raises(StoreError, match="Cannot read the report"):
        Report.load(tmp_path)
    with pytest.raises(StoreError, match="Cannot write"):
        report().save(tmp_path)


def test_looking_things_up() -> None:
    from subspace_probe.core.errors import UnknownName
    from subspace_probe.core.findings import Finding

    made = report()
    assert made.finding("rate").n == 12
    assert [finding.name for finding in made.failures()] == ["cosine"]
    table = made.tables["curve"]
    assert table.column("layer") == [0, 1]
    assert table.where(layer=1).records() == [{"layer": 1, "value": None, "name": "<b>"}]
    for call, why in [
        (lambda: made.finding("ratte"), r"Unknown finding 'ratte'. Did you mean 'rate'\?"),
        (lambda: table.column("leyer"), "Unknown column 'leyer'. Did you mean 'layer'"),
    ]:
        with pytest.raises(UnknownName, match=why):
            call()
    third = [Finding("third", "", 1.0)]
    longer = made + third
    longer = longer + made
    assert [finding.name for finding in longer.findings] == ["rate", "cosine", "third", "rate", "cosine"]
    assert longer.tables == made.tables


def test_it_shows_itself() -> None:
    from subspace_probe.core.reports import number, span

    made = report()
    assert "rate" in repr(made)
    assert "supported" in repr(made)
    assert "<td>rate</td>" in made._repr_html_()
    assert span(None) == ""
    assert span(made.findings[0].interval) == f"[{number(0.1)}, {number(0.4)}]"
