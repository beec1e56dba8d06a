"""How well scores tell the classes apart, and what probabilities are worth: whatever needs no threshold."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from subspace_probe.core.findings import Finding, Interval, judge_absence
from subspace_probe.core.intervals import range_of
from subspace_probe.core.reports import Table
from subspace_probe.guard.group_draws import share_of
from subspace_probe.guard.measured import Measured, Slice
from subspace_probe.guard.nulls import Nulls
from subspace_probe.guard.ranked import AUPRC, AUROC, Reading, tpr_at
from subspace_probe.guard.reliability import Bins, brier, calibrated_errors, expected_calibration_error
from subspace_probe.linalg.resampling import wilson_interval

MARGIN = 0.05
"""What counts as no better than chance in an area under a curve, and as no error in a probability."""
RATES = {"1pct": 0.01, "0.1pct": 0.001}
NONE = float("nan")


def separation_findings(measured: Measured, nulls: Nulls | None) -> list[Finding]:
    """AUROC, AUPRC, and the share of positives found at small false-positive rates."""
    share = float(measured.y.mean())
    n = len(measured.y)
    found = [
        _read(measured, "auroc", "scores tell positive prompts from negative ones", AUROC, nulls, no_effect=0.5),
        _with(
            _read(measured, "auprc", "what is flagged first is positive", AUPRC, nulls, no_effect=share),
            f"by chance it is the share of positives, {share:.3g}",
        ),
    ]
    negatives = int((~measured.y).sum())
    for name, rate in RATES.items():
        claim = f"positive prompts are found at a false-positive rate of {100 * rate:g} %"
        if negatives < round(1 / rate):
            note = f"{negatives} negatives cannot tell of a rate of {rate:g}: it takes {round(1 / rate)} at least"
            found.append(Finding(f"tpr.at_fpr_{name}", claim, NONE, n=n, verdict="not tested", note=note))
            continue
        finding = _read(measured, f"tpr.at_fpr_{name}", claim, tpr_at(rate), nulls, no_effect=rate)
        groups = measured.prompts.counts[0]
        note = f"the threshold is set on these very prompts, on {negatives} negatives in {groups} groups"
        found.append(_with(finding, note))
    return found


def _with(finding: Finding, note: str) -> Finding:
    """The finding with a further note."""
    return replace(finding, note="; ".join(filter(None, (note, finding.note))))


def _read(
    measured: Measured, name: str, claim: str, reading: Reading, nulls: Nulls | None, *, no_effect: float
) -> Finding:
    ranked = measured.ranked
    null = None if nulls is None else nulls.range(reading, measured.prompts)
    finding = Finding(name, claim, ranked.value(reading), ranked.interval(reading), null, len(measured.y))
    return _explained(finding.judged("above", margin=MARGIN, no_effect=no_effect))


def _explained(finding: Finding) -> Finding:
    """Says so where the guard is good, and so is nearly any direction."""
    null = finding.null
    if finding.verdict != "inconclusive" or null is None or null.high < finding.estimate - 2 * MARGIN:
        return finding
    return replace(finding, note=f"{null.of} reach {null.high:.3f}: these prompts are easily told apart at this site")


def slice_findings(measured: Measured, slices: Sequence[Slice], nulls: Nulls | None) -> list[Finding]:
    """AUROC, and the shares flagged at the threshold, in every slice."""
    found: list[Finding] = []
    for part in slices:
        mask, ranked = part.mask, measured.ranked.where(part.mask)
        claim, n = f"the classes are told apart where {part.label}", int(part.mask.sum())
        if ranked.both:
            null = None if nulls is None else nulls.range(AUROC, measured.prompts, mask)
            finding = Finding(f"auroc.{part.name}", claim, ranked.value(AUROC), ranked.interval(AUROC), null, n)
            found.append(_explained(finding.judged("above", margin=MARGIN, no_effect=0.5)))
        else:
            only = "positive" if ranked.y.any() else "negative"
            note = f"only {only} prompts here"
            found.append(Finding(f"auroc.{part.name}", claim, NONE, n=n, verdict="not tested", note=note))
        for short, side, what in (("tpr", measured.y, "positive"), ("fpr", ~measured.y, "negative")):
            if (rows := mask & side).any():
                groups = measured.examples.groups[rows]
                rate, spread = share_of(measured.flagged[rows], groups, seed=measured.seed)
                claim = f"share of {what} prompts flagged where {part.label}"
                found.append(Finding(f"{short}.{part.name}", claim, rate, spread, n=int(rows.sum())))
    return found


def guard_table(measured: Measured, slices: Sequence[Slice]) -> Table:
    """AUROC overall and by slice, as the figure `guard` draws it."""
    everything = Slice("all.prompts", np.ones(len(measured.y), dtype=bool))
    rows: list[dict[str, Any]] = []
    for part in (everything, *slices):
        ranked = measured.ranked.where(part.mask)
        spread = ranked.interval(AUROC) if ranked.both else Interval(NONE, NONE)
        rows.append(
            {
                "framing": part.label if part is not everything else "all prompts",
                "auroc": ranked.value(AUROC) if ranked.both else NONE,
                "low": spread.low,
                "high": spread.high,
                "n": int(part.mask.sum()),
            }
        )
    return Table.of(rows, "AUROC of the guard's score on prompts that it was not made from.")


def probability_findings(measured: Measured) -> list[Finding]:
    """Expected calibration error and Brier score."""
    p, y, prompts = measured.probabilities, measured.y, measured.prompts
    bins, n = Bins.of(p), len(measured.y)
    error = float(expected_calibration_error(p, y, bins)[0])
    score = float(brier(p, y)[0])
    drawn = prompts.of(lambda weights: expected_calibration_error(p, y, bins, weights))
    null = range_of(
        torch.tensor(calibrated_errors(p, bins, draws=1000, seed=measured.seed)),
        "labels drawn from the guard's own probabilities",
    )
    calibrated = measured.guard.calibration
    how = "not calibrated" if calibrated is None else f"calibrated by {calibrated.method}"
    spread = _spread(measured, drawn, error)
    score_spread = _spread(measured, prompts.of(lambda weights: brier(p, y, weights)), score)
    note = (
        f"{bins.count} bins of equal mass; {how}. Binning alone gives a perfect guard {null.low:.3g} to "
        f"{null.high:.3g} here, and bootstrap draws lie above the estimate for the same reason"
    )
    verdict = judge_absence(spread, margin=MARGIN)
    share = float(y.mean())
    constant = share * (1 - share)
    return [
        Finding("ece", "probabilities are right to within 0.05", error, spread, null, n, verdict, note=note),
        Finding(
            "brier",
            "probabilities are nearer to what happened than the base rate is",
            score,
            score_spread,
            Interval(constant, constant, of="the base rate for every prompt"),
            n,
            "supported"
            if score_spread.high < constant
            else "refuted"
            if score_spread.low > constant
            else "inconclusive",
        ),
    ]


def _spread(measured: Measured, drawn: Any, estimate: float) -> Interval:
    """Percentiles of the draws; where no prompt is misjudged, one that was not seen may be, and cost up to 1."""
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    of = "groups of prompts, stratified bootstrap"
    if ((measured.probabilities > 0.5) == measured.y).all():
        groups = len(np.unique(measured.prompts.groups))
        high = max(high, wilson_interval(0, groups)[2])
        of += f"; upper end for none of {groups} groups misjudged, Wilson"
    return Interval(min(low, estimate), max(high, estimate), of=of)


def reliability_table(measured: Measured) -> Table:
    """Mean probability and share of positives in each bin."""
    bins, rows = Bins.of(measured.probabilities), list[dict[str, Any]]()
    for number in range(bins.count):
        inside = bins.index == number
        n, positives = int(inside.sum()), int(measured.y[inside].sum())
        frequency, low, high = wilson_interval(positives, n)
        confidence = float(measured.probabilities[inside].mean())
        row = {"bin": number, "confidence": confidence, "frequency": frequency, "n": n, "low": low, "high": high}
        rows.append(row)
    return Table.of(rows, f"{len(measured.y)} prompts in bins of equal mass; intervals of the share are Wilson's.")
