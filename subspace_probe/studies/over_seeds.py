"""One report over several seeds and cases: what is the same whoever draws the prompts, and what was luck."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from scipy import stats

from subspace_probe.core.findings import Expectation, Finding, Interval, Verdict
from subspace_probe.core.reports import Provenance, Report, Table, number

ABOUT: Mapping[str, str] = {
    "seeds": "Every finding of every run; the findings above are their means.",
    "runs": "One run a row. Each has a page of its own, with its figures.",
    "summary": "How many expectations are met in all runs, and what each case says at its first seed.",
}


@final
@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        case: what it ran on, where a study has several cases; else "".
        seed: of prompts, draws and fits.
        report: what it found.
    """

    case: str
    seed: int
    report: Report

    @property
    def folder(self) -> str:
        """Where its own report lies, beside the report over all runs."""
        return f"{self.case}-seed-{self.seed}" if self.case else f"seed-{self.seed}"


def over_seeds(runs: Sequence[Run]) -> Report:
    """The findings of all runs, each as its mean over seeds.

    The interval is Student's over the seeds, or as wide as the runs' own where those are wider: seeds of one model
    share it, so that their spread alone says too little. A verdict stands where all seeds agree, and where their spread
    does not reach the null that none of them reached. An expectation that a single seed does not meet is unmet,
    whatever the mean: it is counted in `seeds.unmet`.

    Args:
        runs: of one study, in order; at least one.
    """
    found: dict[tuple[str, str], list[tuple[int, Finding]]] = {}
    for run in runs:
        for finding in run.report.findings:
            found.setdefault((run.case, finding.name), []).append((run.seed, finding))
    seeds = {case: sum(run.case == case for run in runs) for case in {run.case for run in runs}}
    findings = tuple(
        replace(_mean(each, seeds[case]), name=_dotted(case, name)) for (case, name), each in found.items()
    )
    unmet = _unmet(runs)
    tables = {
        "seeds": Table.of([_row(run, finding) for run in runs for finding in run.report.findings], ABOUT["seeds"]),
        "runs": Table.of([_run_row(run) for run in runs], ABOUT["runs"]),
        "summary": Table.of([{"sentence": line} for line in _summary(runs, unmet)], ABOUT["summary"]),
    }
    return Report(runs[0].report.study, (*findings, unmet), tables, _provenance(runs))


def _dotted(case: str, name: str) -> str:
    return f"{case}.{name}" if case else name


def _mean(found: Sequence[tuple[int, Finding]], n_runs: int) -> Finding:
    """One finding over the seeds that have it."""
    first = found[0][1]
    values = [finding.estimate for _, finding in found if not math.isnan(finding.estimate)]
    if len(found) == n_runs == 1:
        return first
    interval = _interval([finding for _, finding in found], values)
    null = _hull([finding.null for _, finding in found])
    verdict = _verdict([finding for _, finding in found], interval, null)
    each = ", ".join(f"{number(finding.estimate)} ({seed})" for seed, finding in found)
    missing = f"; in {len(found)} of {n_runs} runs" if len(found) < n_runs else ""
    notes = {finding.note for _, finding in found}
    return replace(
        first,
        estimate=statistics.fmean(values) if values else math.nan,
        interval=interval,
        null=null,
        n=sum(finding.n for _, finding in found),
        verdict=verdict,
        note=f"By seed: {each}{missing}." + (f" {first.note}" if len(notes) == 1 and first.note else ""),
    )


def _verdict(found: Sequence[Finding], interval: Interval | None, null: Interval | None) -> Verdict:
    """The verdict of all runs, unless the seeds differ so much that another one might reach what the control gives."""
    verdicts: set[Verdict] = {finding.verdict for finding in found}
    if len(verdicts) > 1:
        return "unaudited" if "unaudited" in verdicts else "inconclusive"
    (verdict,) = verdicts
    apart = not any(_overlap(finding.interval, finding.null) for finding in found)
    return "inconclusive" if verdict == "supported" and apart and _overlap(interval, null) else verdict


def _overlap(one: Interval | None, other: Interval | None) -> bool:
    return one is not None and other is not None and one.low <= other.high and other.low <= one.high


def _interval(found: Sequence[Finding], values: Sequence[float]) -> Interval | None:
    """Student's interval over seeds, or the runs' own mean width where that is more."""
    n, of = len(values), "{} seeds, Student's t, or the runs' own intervals where wider"
    sides = [
        (finding.estimate - interval.low, interval.high - finding.estimate)
        for finding in found
        if (interval := finding.interval) is not None and interval.low == interval.low
    ]
    if not values or (n == 1 and not sides):
        return None
    over = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5 if n > 1 else 0.0
    below, above = (max(over, statistics.fmean(side)) for side in zip(*sides, strict=True)) if sides else (over, over)
    centre = statistics.fmean(values)
    return Interval(centre - below, centre + above, of=of.format(n))


def _hull(nulls: Sequence[Interval | None]) -> Interval | None:
    """What the control gives in any of the runs."""
    given = [null for null in nulls if null is not None and null.low == null.low]
    if len(given) < len(nulls):
        return None
    low, high = min(null.low for null in given), max(null.high for null in given)
    return Interval(low, high, min(null.level for null in given), of=f"{given[0].of}; the widest of {len(given)} runs")


def _unmet(runs: Sequence[Run]) -> Finding:
    failures = [(run, finding) for run in runs for finding in run.report.failures()]
    stated = sum(finding.expected is not None for run in runs for finding in run.report.findings)
    names = "; ".join(f"{_dotted(run.case, f.name)} at seed {run.seed}: {number(f.estimate)}" for run, f in failures)
    return Finding(
        "seeds.unmet",
        "every stated expectation is met in every run",
        float(len(failures)),
        n=stated,
        verdict=("refuted" if failures else "supported") if stated else "not tested",
        expected=Expectation(below=0.0),
        note=names or f"{stated} expectations in {len(runs)} runs.",
    )


def _row(run: Run, finding: Finding) -> dict[str, Any]:
    nothing = Interval(math.nan, math.nan)
    interval, null = finding.interval or nothing, finding.null or nothing
    return {
        "case": run.case,
        "seed": run.seed,
        "finding": finding.name,
        "estimate": finding.estimate,
        "low": interval.low,
        "high": interval.high,
        "null_low": null.low,
        "null_high": null.high,
        "verdict": finding.verdict,
        "least": None if finding.expected is None else finding.expected.above,
        "most": None if finding.expected is None else finding.expected.below,
        "met": finding.met,
    }


def _run_row(run: Run) -> dict[str, Any]:
    source = run.report.provenance
    return {
        "case": run.case,
        "seed": run.seed,
        "model": source.model,
        "fingerprint": source.fingerprint,
        "seconds": source.seconds,
        "unmet": len(run.report.failures()),
        "page": f"{run.folder}/report.html",
    }


def _summary(runs: Sequence[Run], unmet: Finding) -> list[str]:
    met = "all are met." if not unmet.estimate else f"{unmet.estimate:.0f} are not met ({unmet.note})."
    lines = [f"{unmet.n} stated expectations in {len(runs)} runs: {met}"] if unmet.n else []
    for case in dict.fromkeys(run.case for run in runs):
        first = next(run for run in runs if run.case == case)
        said = first.report.tables.get("summary")
        head = f"{case}: " if case else ""
        lines += [f"{head}{sentence}" for sentence in ([] if said is None else said.column("sentence"))]
    return lines


def _provenance(runs: Sequence[Run]) -> Provenance:
    sources = [run.report.provenance for run in runs]
    models = ", ".join(dict.fromkeys(source.model for source in sources))
    first = asdict(sources[0])
    return Provenance(
        **first
        | {
            "model": models,
            "fingerprint": ", ".join(dict.fromkeys(source.fingerprint for source in sources)),
            "data": "; ".join(dict.fromkeys(source.data for source in sources)),
            "config": {**sources[0].config, "seeds": sorted({run.seed for run in runs})},
            "seconds": round(sum(source.seconds for source in sources), 1),
        }
    )
