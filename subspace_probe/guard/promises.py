"""What a guard does at its threshold: whether it keeps its promise, what it finds, and what a flag is worth."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int

from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.reports import Table
from subspace_probe.guard.classifier import GuardClassifier
from subspace_probe.guard.examples import Shown, examples_of
from subspace_probe.guard.group_draws import Weights, share_of
from subspace_probe.guard.measured import Measured

NONE = float("nan")


def threshold_findings(measured: Measured) -> list[Finding]:
    """False-positive rate beside what was promised, recall and F1 at the threshold, and the share abstained on."""
    y, flagged, seed = measured.y, measured.flagged, measured.seed
    recall, spread = share_of(flagged[y], measured.examples.groups[y], seed=seed)
    held = measured.guard.threshold
    where = "the probe's own boundary: no threshold is set" if held is None else "the threshold"
    found = [
        kept_promise(measured.guard, "fpr.at_threshold", flagged[~y], measured.examples.groups[~y], seed=seed),
        Finding("recall.at_threshold", f"share of positive prompts flagged at {where}", recall, spread, n=int(y.sum())),
        _f1(measured, where),
    ]
    if measured.guard.gate is not None:
        share, spread = share_of(measured.abstained, measured.examples.groups, seed=seed)
        claim = "share of prompts that are not flagged but unlike the benign states that the gate knows"
        found.append(Finding("abstained", claim, share, spread, n=len(y)))
    return found


def kept_promise(
    guard: GuardClassifier, name: str, flagged: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"], *, seed: int
) -> Finding:
    """The false-positive rate on negatives, counted as the threshold counts: by prompt or by group.

    *supported*: the interval lies at or below what was promised; *refuted*: above it; else *inconclusive*, since so few
    negatives cannot tell.
    """
    held = guard.threshold
    n, share = len(flagged), float(flagged.mean())
    if held is not None and held.grouped:
        names, index = np.unique(groups, return_inverse=True)
        by_group = np.zeros(len(names), dtype=bool)
        np.logical_or.at(by_group, index, flagged)
        flagged, groups, unit = by_group, names, "groups"
    else:
        unit = "prompts"
    rate, spread = share_of(flagged, groups, seed=seed)
    count = f"{int(flagged.sum())} of {len(flagged)} {unit} flagged"
    if unit == "groups":
        count += f", {share:.3g} of prompts"
    if held is None:
        claim = "share of negatives flagged at the probe's own boundary: no threshold is set"
        return Finding(name, claim, rate, spread, n=n, note=count)
    promise = Interval(0.0, held.bound, held.level, of=f"promised: {held}")
    agrees = "agrees with" if spread.low <= held.bound else "breaks"
    verdict = "supported" if spread.high <= held.bound else "refuted" if spread.low > held.bound else "inconclusive"
    return Finding(
        name,
        f"{unit} of negatives are flagged at the threshold no more often than promised: at most {held.bound:.3g}",
        rate,
        spread,
        promise,
        n,
        verdict,
        note=f"{count}; this {agrees} the promise",
    )


def _f1(measured: Measured, where: str) -> Finding:
    y, flagged = measured.y, measured.flagged
    best = float(measured.ranked.curve().best_f1()[0])

    def f1(weights: Weights) -> Float64[np.ndarray, " draws"]:
        hits = weights @ (flagged & y)
        return 2 * hits / np.maximum(weights @ flagged.astype(np.float64) + weights @ y.astype(np.float64), 1e-12)

    estimate = float(f1(np.ones((1, len(y))))[0])
    spread = measured.prompts.interval(f1, estimate)
    note = f"the best F1 of any threshold on these prompts, an optimistic figure, is {best:.3f}"
    return Finding("f1.at_threshold", f"F1 at {where}", estimate, spread, n=len(y), note=note)


def hard_benign_finding(guard: GuardClassifier, shown: Shown, *, seed: int) -> Finding:
    """The false-positive rate on harmless prompts that look harmful."""
    guard.require_unseen(shown, "report as hard benign")
    examples = examples_of(shown)
    found = kept_promise(guard, "fpr.hard_benign", guard.predict(shown).astype(bool), examples.groups, seed=seed)
    return replace(found, claim=f"on hard benign prompts, {found.claim}")


def base_rate_findings(measured: Measured, base_rates: Sequence[float]) -> tuple[list[Finding], Table]:
    """The share of flagged prompts that are positive, at stated shares of positives among all.

    From Bayes' rule on recall and false-positive rate; its interval from draws of both rates, Beta with half a prompt
    added on either side (Jeffreys), counted by group. Not from the share of positives in the test, which is chosen.
    """
    y, flagged = measured.y, measured.flagged
    negatives, positives = measured.prompts.counts
    tpr, fpr = float(flagged[y].mean()), float(flagged[~y].mean())
    rng = np.random.default_rng(measured.seed)
    many = 10_000
    tprs = rng.beta(tpr * positives + 0.5, (1 - tpr) * positives + 0.5, many)
    fprs = rng.beta(fpr * negatives + 0.5, (1 - fpr) * negatives + 0.5, many)
    found: list[Finding] = []
    rows: list[dict[str, Any]] = []
    for rate in base_rates:
        estimate = precision(rate, tpr, fpr)
        low, high = (float(end) for end in np.quantile(precision(rate, tprs, fprs), [0.025, 0.975]))
        high = 1.0 if fpr == 0 else high  # nothing was flagged wrongly: the upper end is not in doubt
        spread = Interval(min(low, estimate), max(high, estimate), of="draws of both rates, Jeffreys, by group")
        claim = f"share of flagged prompts that are positive where {rate:g} of all are"
        found.append(Finding(f"precision.base_rate_{rate:g}", claim, estimate, spread, n=len(y)))
        row = {"base_rate": rate, "precision": estimate, "low": spread.low, "high": spread.high}
        rows.append(row | {"flagged": rate * tpr + (1 - rate) * fpr, "tpr": tpr, "fpr": fpr})
    return found, Table.of(rows, "What a flag is worth where few prompts are positive.")


def precision(base_rate: float, tpr: Any, fpr: Any) -> Any:
    """Share of flagged prompts that are positive, from the rates (Bayes); NaN where nothing is flagged."""
    right, wrong = base_rate * np.asarray(tpr), (1 - base_rate) * np.asarray(fpr)
    with np.errstate(invalid="ignore"):
        found = right / (right + wrong)
    return float(found) if found.ndim == 0 else found


def threshold_table(measured: Measured, findings: Sequence[Finding]) -> Table:
    """The threshold, what it promises and what it did here."""
    held = measured.guard.threshold
    by_name = {finding.name: finding for finding in findings}
    realised, recall = by_name["fpr.at_threshold"], by_name["recall.at_threshold"]
    row: dict[str, Any] = {
        "value": measured.guard.boundary,
        "target_fpr": NONE if held is None else held.target_fpr,
        "confidence": None if held is None else held.confidence,
        "negatives": 0 if held is None else held.n,
        "unit": "none" if held is None else "groups" if held.grouped else "prompts",
        "bound": NONE if held is None else held.bound,
    }
    for name, finding in (("fpr", realised), ("recall", recall)):
        low, high = (finding.interval.low, finding.interval.high) if finding.interval else (NONE, NONE)
        row |= {name: finding.estimate, f"{name}_low": low, f"{name}_high": high}
    return Table.of([row], "What the threshold promises, and what it did on these prompts.")
