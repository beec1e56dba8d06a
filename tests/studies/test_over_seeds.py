"""The report over seeds, against means, Student's interval and ranges computed by hand."""

import math
from typing import TYPE_CHECKING

import pytest
from scipy import stats

if TYPE_CHECKING:
    from subspace_probe.core.findings import Finding, Verdict
    from subspace_probe.studies.over_seeds import Run


def _finding(value: float, half: float | None = None, verdict: "Verdict" = "supported") -> "Finding":
    from subspace_probe.core.findings import Expectation, Finding, Interval

    interval = None if half is None else Interval(value - half, value + half)
    null = Interval(-value, value / 10, of="40 random directions")
    return Finding("rate", "it works", value, interval, null, 10, verdict, Expectation(above=0.5))


def _runs(*findings: "Finding", case: str = "") -> "list[Run]":
    from subspace_probe.core.reports import Provenance, Report, Table
    from subspace_probe.studies.over_seeds import Run

    summary = {"summary": Table(("sentence",), (("It works.",),))}
    return [
        Run(case, seed, Report("s", (finding,), summary, Provenance.now(model=f"m{seed}", seconds=2.0)))
        for seed, finding in enumerate(findings)
    ]


def test_mean_interval_and_null() -> None:
    from subspace_probe.studies.over_seeds import over_seeds

    values = [0.6, 0.9, 0.7]
    report = over_seeds(_runs(*(_finding(value) for value in values)))
    found = report.finding("rate")
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert found.estimate == pytest.approx(sum(values) / 3)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high))
    assert found.null is not None
    assert (found.null.low, found.null.high) == pytest.approx((-0.9, 0.09))
    assert (found.n, found.verdict) == (30, "supported")
    assert "0.600 (0), 0.900 (1), 0.700 (2)" in found.note
    assert report.provenance.seconds == 6.0
    assert not report.failures()


def test_seeds_that_agree_do_not_make_an_interval_vanish() -> None:
    """Three equal estimates with intervals of their own: the interval is as wide as those."""
    from subspace_probe.studies.over_seeds import over_seeds

    found = over_seeds(_runs(*(_finding(1.0, 0.1) for _ in range(3)))).finding("rate")
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((0.9, 1.1))


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (("supported", "supported"), "supported"),
        (("supported", "refuted"), "inconclusive"),
        (("supported", "unaudited"), "unaudited"),
    ],
)
def test_a_verdict_stands_where_all_agree(verdicts: "tuple[Verdict, ...]", said: str) -> None:
    from subspace_probe.studies.over_seeds import over_seeds

    runs = _runs(*(_finding(0.8, verdict=verdict) for verdict in verdicts))
    assert over_seeds(runs).finding("rate").verdict == said


@pytest.mark.parametrize(("values", "said"), [((0.7, 0.8, 0.75), "supported"), ((0.3, 0.9, 0.5), "inconclusive")])
def test_seeds_that_differ_as_much_as_the_effect_do_not_support_it(values: tuple[float, ...], said: str) -> None:
    """Each run lies above its null, by an interval of its own; the spread over seeds reaches the null or does not."""
    from subspace_probe.studies.over_seeds import over_seeds

    assert over_seeds(_runs(*(_finding(value, 0.1) for value in values))).finding("rate").verdict == said


def test_cases_are_kept_apart_and_an_unmet_seed_is_named() -> None:
    from subspace_probe.studies.over_seeds import over_seeds

    runs = [*_runs(_finding(0.9), _finding(0.4), case="a"), *_runs(_finding(0.8), case="b")]
    report = over_seeds(runs)
    assert report.finding("a.rate").met  # the mean is above a half, one seed is not
    unmet = report.finding("seeds.unmet")
    assert (unmet.estimate, unmet.verdict, unmet.met) == (1.0, "refuted", False)
    assert unmet.note == "a.rate at seed 1: 0.400"
    assert report.finding("b.rate") == _finding(0.8).__class__(**{**vars(_finding(0.8)), "name": "b.rate"})
    assert report.tables["runs"].column("page") == [
        "a-seed-0/report.html", "a-seed-1/report.html", "b-seed-0/report.html",
    ]  # fmt: skip
    assert report.tables["summary"].column("sentence")[1:] == ["a: It works.", "b: It works."]


def test_what_could_not_be_computed_is_no_zero() -> None:
    from subspace_probe.studies.over_seeds import over_seeds

    found = over_seeds(_runs(_finding(math.nan), _finding(0.7))).finding("rate")
    assert found.estimate == pytest.approx(0.7)


def test_the_page_links_every_run_and_draws_the_seeds() -> None:
    from subspace_probe.figures import draw
    from subspace_probe.figures.html import page
    from subspace_probe.studies.over_seeds import over_seeds

    report = over_seeds(_runs(_finding(0.9), _finding(0.4)))
    figure = draw(report)["seeds"]
    marks = {trace.name: list(trace.x) for trace in figure.data if trace.mode == "markers"}
    assert marks == {"met": [0.9], "not met": [0.4]}
    assert '<a href="seed-1/report.html">' in page(report, {})
