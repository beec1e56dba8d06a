"""Two guards on the same prompts: which is better, where, and by how much; they may read different models."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy.stats import binomtest

from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.reports import Provenance, Report, Table, number, span
from subspace_probe.guard.classifier import GuardClassifier, Labels
from subspace_probe.guard.examples import Groups, Shown
from subspace_probe.guard.group_draws import share_of
from subspace_probe.guard.measured import Measured, Slice
from subspace_probe.guard.operating import operating_table
from subspace_probe.guard.ranked import AUROC, Ranked, Reading, tpr_at

STUDY = "guard_comparison"
MARGIN = 0.01
"""What counts as no difference between two areas or rates."""
NONE = float("nan")
NO_DIFFERENCE = Interval(0.0, 0.0, of="no difference")


def compare_guards(
    first: GuardClassifier,
    second: GuardClassifier,
    X: Shown,
    y: Labels | None = None,
    *,
    groups: Groups | None = None,
    slices: Sequence[str] = (),
    fprs: Sequence[float] = (0.01, 0.001),
    names: tuple[str, str] = ("first", "second"),
    draws: int = 1000,
    seed: int = 0,
) -> Report:
    """Measure two guards on labelled prompts that neither was made from.

    Differences are the first's less the second's, on the same bootstrap draws.

    Args:
        first, second: fitted; on the same model or on two.
        X, y, groups, slices: as for `guard_report`.
        fprs: false-positive rates at which recall is compared, each guard with a threshold of its own.
        names: of the guards, for tables.

    Raises:
        DataError: prompts that one of them was made from, or of one class only.
    """
    start = perf_counter()
    a, b = (Measured.of(guard, X, y, groups, draws=draws, seed=seed) for guard in (first, second))
    everything = Slice("all prompts", np.ones(len(a.y), dtype=bool))
    parts = (everything, *a.slices(slices))
    findings = _curves(a, b, parts[1:], fprs) + _decisions(a, b)
    rows = [row for part in parts for row in _rows(a, b, part, names)]
    tables = {
        "summary": Table.of([{"sentence": sentence} for sentence in _summary(findings, names)]),
        "comparison": Table.of(rows, "AUROC of both guards on the same prompts."),
        "operating": operating_table({names[0]: a.ranked, names[1]: b.ranked}),
    }
    models = list(dict.fromkeys(guard.model.spec.name for guard in (first, second)))
    prints = list(dict.fromkeys(guard.model.fingerprint for guard in (first, second)))
    config = {"slices": list(slices), "fprs": list(fprs), "draws": draws}
    provenance = Provenance.now(
        model=" and ".join(models),
        fingerprint=" ".join(prints),
        data=a.name,
        config=config | {name: guard.describe() for name, guard in zip(names, (first, second), strict=True)},
        seed=seed,
        seconds=perf_counter() - start,
    )
    return Report(STUDY, tuple(findings), tables, provenance)


def _curves(a: Measured, b: Measured, slices: Sequence[Slice], fprs: Sequence[float]) -> list[Finding]:
    findings = [_difference("difference.auroc", "the first has a higher AUROC", a.ranked, b.ranked, AUROC)]
    negatives = int((~a.y).sum())
    for fpr in fprs:
        name, claim = f"difference.tpr_{fpr:g}", f"the first finds more at a false-positive rate of {fpr:g}"
        if negatives < round(1 / fpr):
            note = f"{negatives} negatives cannot tell of such a rate: it takes {round(1 / fpr)} at least"
            findings.append(Finding(name, claim, NONE, n=len(a.y), verdict="not tested", note=note))
        else:
            findings.append(_difference(name, claim, a.ranked, b.ranked, tpr_at(fpr)))
    for part in slices:
        some = a.ranked.where(part.mask)
        if some.both:
            claim = f"the first has a higher AUROC where {part.label}"
            other = b.ranked.where(part.mask)
            findings.append(_difference(f"difference.auroc.{part.name}", claim, some, other, AUROC))
    return findings


def _difference(name: str, claim: str, first: Ranked, second: Ranked, reading: Reading) -> Finding:
    gap, spread = first.above(second, reading)
    note = f"{first.value(reading):.3f} and {second.value(reading):.3f}"
    finding = Finding(name, claim, gap, spread, NO_DIFFERENCE, len(first.y), note=note)
    return finding.judged("above", margin=MARGIN)


def _decisions(a: Measured, b: Measured) -> list[Finding]:
    """Agreement, and who is right where they disagree, at each guard's own threshold."""
    share, spread = share_of(a.flagged == b.flagged, a.examples.groups, seed=a.seed)
    note = f"Cohen's kappa {number(_kappa(a.flagged, b.flagged))}"
    agreed = Finding("agreement", "share of prompts on which both decide alike", share, spread, n=len(a.y), note=note)
    return [agreed, _mcnemar(a, b)]


def _mcnemar(a: Measured, b: Measured) -> Finding:
    """Of the prompts on which one guard alone is right, the share that is the first's; by chance one half.

    The exact test of McNemar 1947 counts prompts one by one; where they come in groups the interval, and the verdict,
    go by group.
    """
    claim, right = "where only one of them is right, it is the first", [one.flagged == one.y for one in (a, b)]
    apart = right[0] != right[1]
    n, won = int(apart.sum()), int((right[0] & apart).sum())
    if not n:
        note = "they are right and wrong on the same prompts"
        return Finding("mcnemar", claim, NONE, n=len(a.y), verdict="not tested", note=note)
    test = binomtest(won, n)
    if a.examples.grouped:
        _, spread = share_of(right[0][apart], a.examples.groups[apart], seed=a.seed)
    else:
        found = test.proportion_ci(0.95, method="exact")
        spread = Interval(float(found.low), float(found.high), of=f"{n} prompts, Clopper-Pearson")
    note = f"{won} prompts against {n - won}, exact p = {float(test.pvalue):.3g} counted by prompt"
    finding = Finding("mcnemar", claim, won / n, spread, Interval(0.5, 0.5, of="either alike"), n, note=note)
    return finding.judged("above", margin=0.0, no_effect=0.5)


def _kappa(first: Bool[np.ndarray, " n"], second: Bool[np.ndarray, " n"]) -> float:
    """Agreement beyond chance (Cohen 1960); NaN where chance alone would agree always."""
    agreed = float((first == second).mean())
    chance = float(first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean()))
    return (agreed - chance) / (1 - chance) if chance < 1 else NONE


def _rows(a: Measured, b: Measured, part: Slice, names: tuple[str, str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, measured in zip(names, (a, b), strict=True):
        ranked = measured.ranked.where(part.mask)
        if ranked.both:
            spread = ranked.interval(AUROC)
            row = {"guard": name, "slice": part.label, "auroc": ranked.value(AUROC), "low": spread.low}
            rows.append(row | {"high": spread.high, "n": int(part.mask.sum())})
    return rows


def _summary(findings: Sequence[Finding], names: tuple[str, str]) -> list[str]:
    by_name = {finding.name: finding for finding in findings}
    auroc, agreed, test = by_name["difference.auroc"], by_name["agreement"], by_name["mcnemar"]
    said = {"supported": "higher", "refuted": "no higher"}.get(auroc.verdict, "not clearly higher")
    return [
        f"The AUROC of {names[0]} is {said} than that of {names[1]}: the difference is {number(auroc.estimate)} "
        f"{span(auroc.interval)} ({auroc.note}).",
        f"At their thresholds they agree on {number(agreed.estimate)} {span(agreed.interval)} of prompts; where only "
        f"one is right, {number(test.estimate)} {span(test.interval)} of the time it is {names[0]} ({test.note}).",
    ]
