"""Verdicts: the whole truth table, and what cannot be judged."""

import math

import pytest

# margin .1, no effect 0, null [-.2, .2]; an interval by where it lies -> verdict by the claimed direction
TABLE = [
    ((0.5, 0.7), {"above": "supported", "below": "refuted", "beyond": "supported"}),
    ((-0.7, -0.5), {"above": "refuted", "below": "supported", "beyond": "supported"}),
    ((-0.05, 0.08), {"above": "refuted", "below": "refuted", "beyond": "refuted"}),  # no effect, and precisely so
    ((0.05, 0.5), {"above": "inconclusive", "below": "inconclusive", "beyond": "inconclusive"}),
    ((-0.5, 0.5), {"above": "inconclusive", "below": "inconclusive", "beyond": "inconclusive"}),
    ((0.15, 0.5), {"above": "inconclusive", "below": "refuted", "beyond": "inconclusive"}),  # inside the null
    ((-0.5, -0.15), {"above": "refuted", "below": "inconclusive", "beyond": "inconclusive"}),
    ((0.2, 0.5), {"above": "inconclusive", "below": "refuted", "beyond": "inconclusive"}),  # touching is not outside
]


@pytest.mark.parametrize(("ends", "verdicts"), TABLE)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_truth_table(ends: tuple[float, float], verdicts: dict[str, str], shift: float) -> None:
    from subspace_probe.core.findings import Interval, judge

    interval, null = Interval(ends[0] + shift, ends[1] + shift), Interval(shift - 0.2, shift + 0.2)
    found = {way: judge(interval, null, way, margin=0.1, no_effect=shift) for way in verdicts}
    assert found == verdicts


def test_what_lacks_an_interval_or_a_null_is_unaudited() -> None:
    from subspace_probe.core.findings import Interval, judge

    some, nan = Interval(0.5, 0.7), Interval(math.nan, 0.7)
    for interval, null in [(None, some), (some, None), (None, None), (nan, some), (some, nan)]:
        assert judge(interval, null, "above", margin=0.1) == "unaudited"


def test_absence_needs_a_narrow_interval_not_a_large_p_value() -> None:
    from subspace_probe.core.findings import Interval, judge_absence

    for ends, expected in [
        ((-0.05, 0.08), "supported"),
        ((-0.1, 0.1), "supported"),
        ((-0.5, 0.5), "inconclusive"),
        ((0.05, 0.3), "inconclusive"),
        ((0.2, 0.3), "refuted"),
        ((-0.3, -0.2), "refuted"),
        ((math.nan, 0.1), "unaudited"),
    ]:
        assert judge_absence(Interval(*ends), margin=0.1) == expected, ends
    assert judge_absence(Interval(0.45, 0.55), margin=0.1, no_effect=0.5) == "supported"
    assert judge_absence(None, margin=0.1) == "unaudited"


def test_a_finding_is_unaudited_until_it_is_judged() -> None:
    from subspace_probe.core.findings import Finding, Interval

    finding = Finding("rate", "it is high", 0.6, Interval(0.5, 0.7), Interval(0.0, 0.2), 10)
    assert finding.verdict == "unaudited"
    assert finding.judged("above", margin=0.1).verdict == "supported"
    assert finding.judged("below", margin=0.1).verdict == "refuted"
    assert finding.verdict == "unaudited"


def test_expectations() -> None:
    from subspace_probe.core.findings import Expectation, Finding, Interval

    expected = Expectation(above=0.2, below=0.8)
    assert [expected.met(x) for x in (0.1, 0.2, 0.5, 0.8, 0.9, math.nan)] == [False, True, True, True, False, False]
    assert str(expected) == ">= 0.2 and <= 0.8"
    assert str(Expectation(below=0.05)) == "<= 0.05"
    assert Finding("a", "b", 0.1).met
    assert not Finding("a", "b", 0.1, expected=expected).met
    assert 0.3 in Interval(0.3, 0.4)
    assert 0.29 not in Interval(0.3, 0.4)


def test_a_smaller_effect_than_the_nulls_is_not_beyond_it() -> None:
    from subspace_probe.core.findings import Interval, judge

    null = Interval(0.5, 0.7)
    for ends, verdict in [((0.15, 0.2), "inconclusive"), ((0.8, 0.9), "supported"), ((-0.9, -0.8), "supported")]:
        assert judge(Interval(*ends), null, "beyond", margin=0.1) == verdict


def test_a_null_of_too_few_draws_supports_nothing() -> None:
    from subspace_probe.core.findings import Interval, judge

    few, enough = Interval(-0.2, 0.2, 0.9), Interval(-0.2, 0.2, 0.95)
    for way in ("above", "beyond"):
        assert judge(Interval(0.5, 0.7), few, way, margin=0.1) == "unaudited"
        assert judge(Interval(0.5, 0.7), enough, way, margin=0.1) == "supported"
    assert judge(Interval(-0.05, 0.08), few, "beyond", margin=0.1) == "refuted"  # needs no null
