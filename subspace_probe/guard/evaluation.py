"""The guard's report: how good it is on prompts it has not seen, what else would do as well, and what could fool it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal, final

import numpy as np
from jaxtyping import Float64
from tqdm.auto import tqdm

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.guard.baselines import (
    BagOfWords,
    Baseline,
    baseline_findings,
    baselines_table,
    majority_finding,
    refusal_baselines,
)
from subspace_probe.guard.classifier import GuardClassifier, Labels
from subspace_probe.guard.controls import controls_table, keyword_control, length_control, template_control
from subspace_probe.guard.examples import Groups, Shown, examples_of
from subspace_probe.guard.held_out import held_out_findings
from subspace_probe.guard.latency import latency_findings
from subspace_probe.guard.measured import Measured, Slice
from subspace_probe.guard.nulls import Nulls
from subspace_probe.guard.operating import operating_table
from subspace_probe.guard.promises import (
    base_rate_findings,
    hard_benign_finding,
    threshold_findings,
    threshold_table,
)
from subspace_probe.guard.quality import (
    guard_table,
    probability_findings,
    reliability_table,
    separation_findings,
    slice_findings,
)
from subspace_probe.guard.report_summary import summary

STUDY = "latent_guard"


def guard_report(
    guard: GuardClassifier,
    X: Shown,
    y: Labels | None = None,
    *,
    groups: Groups | None = None,
    train: Contrast | None = None,
    hard_benign: Shown | None = None,
    slices: Sequence[str] = (),
    source: str | None = None,
    base_rates: Sequence[float] = (0.001, 0.01, 0.1),
    refused: str | None = None,
    keywords: Literal["auto"] | Sequence[str] = "auto",
    latency: bool = True,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Measure a guard on labelled prompts that it was not made from.

    Every figure has an interval by group; what is a claim has a null and a verdict. Without `train` there is nothing to
    judge by, and claims stay unaudited.

    Args:
        guard: fitted; with a threshold, if its promise is to be checked.
        X: prompts, a contrast, or activations captured at the guard's position.
        y: 1 for what the guard looks for; a contrast brings its own.
        groups: near-duplicates and common sources, which intervals are drawn by.
        train: what the guard was fitted on: baselines and nulls are fitted on it too.
        hard_benign: harmless prompts that look harmful.
        slices: factors of the contrast, whose values are reported one by one.
        source: a factor of both contrasts: the probe is refitted without each value and measured on it.
        base_rates: shares of positives in traffic, for which the worth of a flag is stated.
        refused: a factor of `train`, 1 where the model refused; gives the refusal direction.
        keywords: words to replace; "auto" takes those that a bag of words goes by.
        latency: whether to time it.
        draws: of the bootstrap.

    Raises:
        DataError: prompts that the guard was made from, or that are in `train`; prompts of one class only.
        UnknownName: no such factor.
        ConfigError: something that needs `train`, without it; base rates outside (0, 1).
    """
    start = perf_counter()
    _check(train, {"source": source, "refused": refused}, base_rates)
    measured = Measured.of(guard, X, y, groups, draws=draws, seed=seed)
    parts = measured.slices(slices)
    with tqdm(total=5, desc="report", disable=not progress, leave=False) as bar:
        trained = None if train is None else _Trained.of(measured, train, refused)
        bar.update()
        made = _Made()
        nulls = None if trained is None else trained.nulls
        made.add(separation_findings(measured, nulls))
        found = threshold_findings(measured)
        made.add(found, threshold=threshold_table(measured, found))
        if hard_benign is not None:
            made.add([hard_benign_finding(guard, hard_benign, seed=seed)])
        found, table = base_rate_findings(measured, base_rates)
        made.add(found, base_rates=table)
        made.add(probability_findings(measured), reliability=reliability_table(measured))
        made.add(slice_findings(measured, parts, nulls), guard=guard_table(measured, parts))
        bar.update()
        if trained is not None:
            _compare(made, measured, trained, parts, source)
        series = [] if trained is None else trained.baselines
        made.tables["operating"] = operating_table(
            {"guard": measured.ranked, **{baseline.name: baseline.ranked for baseline in series}}
        )
        bar.update()
        _control(made, measured, None if trained is None else trained.bag, keywords)
        bar.update()
        if latency:
            found, table = latency_findings(guard, measured.examples.prompts, seed=seed)
            made.add(found, latency=table)
        bar.update()
    findings = tuple(_noted(made.findings))
    tables = {"summary": summary(measured, findings), **made.tables}
    config = {
        "guard": guard.describe(), "train": None if train is None else train.name, "slices": list(slices),
        "source": source, "refused": refused, "base_rates": list(base_rates), "draws": draws,
        "keywords": keywords if isinstance(keywords, str) else list(keywords), "latency": latency,
    }  # fmt: skip
    provenance = Provenance.now(
        model=guard.model.spec.name,
        fingerprint=guard.model.fingerprint,
        data=measured.name,
        config=config,
        seed=seed,
        seconds=perf_counter() - start,
    )
    return Report(STUDY, findings, tables, provenance)


@final
@dataclass
class _Made:
    """What the report has so far."""

    findings: list[Finding] = field(default_factory=list[Finding])
    tables: dict[str, Table] = field(default_factory=dict[str, Table])

    def add(self, findings: Sequence[Finding], **tables: Table) -> None:
        """Take in findings, and tables by name."""
        self.findings += findings
        self.tables |= tables


@final
@dataclass(frozen=True, eq=False)
class _Trained:
    """Everything that is fitted on the training prompts."""

    train: Contrast
    states: Float64[np.ndarray, "t f"]
    nulls: Nulls
    bag: BagOfWords | None
    baselines: tuple[Baseline, ...]

    @classmethod
    def of(cls, measured: Measured, train: Contrast, refused: str | None) -> "_Trained":
        train.require_both_classes(2)
        measured.require_apart(examples_of(train), "train")
        states = measured.guard.states(train)
        nulls = Nulls.of(measured.guard, train, states, measured.rows, measured.prompts)
        bag = BagOfWords.fit(train.prompts, train.labels)
        baselines: list[Baseline] = []
        if bag is not None:
            ranked = measured.rank(bag.scores(measured.examples.prompts))
            baselines.append(Baseline("tfidf", ranked, "TF-IDF of words and word pairs with logistic regression"))
        if refused is not None:
            baselines += refusal_baselines(measured, train, refused)
        return cls(train, states, nulls, bag, tuple(baselines))


def _compare(made: _Made, measured: Measured, trained: _Trained, parts: Sequence[Slice], source: str | None) -> None:
    if source is not None:
        made.add(held_out_findings(measured, trained.train, trained.states, source, trained.nulls))
    made.add([majority_finding(measured, trained.train)])
    table = baselines_table(measured, trained.baselines, parts, trained.nulls)
    made.add(baseline_findings(measured, trained.baselines, parts), baselines=table)


def _control(
    made: _Made, measured: Measured, bag: BagOfWords | None, keywords: Literal["auto"] | Sequence[str]
) -> None:
    controls = []
    if bag is not None:
        findings, controls = keyword_control(measured, bag, keywords)
        made.add(findings)
    for control in (length_control, template_control):
        findings, found = control(measured, bag)
        made.add(findings)
        controls += found
    made.tables["controls"] = controls_table(controls, measured)


def _noted(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, with the first saying so where a bag of words does as well."""
    by_name: Mapping[str, Finding] = {finding.name: finding for finding in findings}
    bag = by_name.get("baseline.tfidf.difference")
    if bag is None or bag.interval is None or bag.interval.low > 0:
        return list(findings)
    note = f"a bag of words does as well: its AUROC is {by_name['baseline.tfidf.auroc'].estimate:.3f}"
    return [
        replace(finding, note="; ".join(filter(None, (note, finding.note)))) if finding.name == "auroc" else finding
        for finding in findings
    ]


def _check(train: Contrast | None, needing: Mapping[str, Any], base_rates: Sequence[float]) -> None:
    asked = [name for name, value in needing.items() if value is not None]
    if train is None and asked:
        raise ConfigError(f"{', '.join(asked)} was asked for, which is fitted on the training prompts. Give train=.")
    wrong = [rate for rate in base_rates if not 0 < rate < 1]
    if wrong:
        raise ConfigError(f"Base rates {wrong} were given. A base rate is a share of positives, between 0 and 1.")
