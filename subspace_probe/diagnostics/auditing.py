"""Every check that applies to an intervention, in shared passes."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, SiteError
from subspace_probe.core.findings import Finding
from subspace_probe.core.protocols import Finder, Intervention, Metric
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.diagnostics import CHECKS
from subspace_probe.diagnostics.budgets import Plan, few, limit_of, planned
from subspace_probe.diagnostics.cases import Case, CaseCheck, Prompts, place_of, subspace_of, with_natural
from subspace_probe.diagnostics.panels import tables_of
from subspace_probe.diagnostics.verdicts import verdict_lines
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.models.hooked import HookedModel


@final
@dataclass(frozen=True, eq=False)
class Examination:
    """An audit with the numbers behind it.

    Attributes:
        case: with the metric of every prompt, clean and edited.
        values: the metric under each check's conditions, shape [condition, n], by the check's name.
    """

    case: Case
    report: Report
    values: Mapping[str, Tensor]


def audit(
    model: HookedModel,
    intervention: Intervention,
    contrast: Contrast,
    metric: str | Metric,
    *,
    refit: tuple[Finder, Contrast | Activations] | None = None,
    neutral: Contrast | None = None,
    checks: Sequence[str | CaseCheck] | None = None,
    natural: Contrast | None = None,
    rerouted: Contrast | None = None,
    budget: float | str | None = None,
    pairs: int = 64,
    margin: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Run the checks that separate a mechanism from an illusion, and a real effect from one any direction has.

    Args:
        refit: the finder and what it was fitted on, for checks that find the subspace again (label permutation,
            stability). Without it they are reported as not tested.
        neutral: prompts whose behaviour should not change, for the specificity check.
        checks: names from `CHECKS`, or checks with settings of their own; default all.
        natural: minimal pairs between which the variable differs (label 0 or 1), for the checks on mechanism. Default:
            the contrast, or what the subspace was found on, where these have pairs; better neither, but held out.
        rerouted: prompts (label 0), each paired with the one that replaces it to move its states (label 1).
        budget: at most so many times the cost of the measurement (the prompts without and with the intervention);
            "quick" stays below 20. What it left out is named in the report. Costs are estimates of model passes; on
            tiny models what surrounds the passes weighs more.
        pairs: at most so many natural pairs.
        margin: half-width of "no effect" in units of the metric. Default: a tenth of the clean gap between the
            classes, or of the metric's standard deviation where the prompts are of one class.
        seed: of every draw.

    Returns:
        A report with the verdicts `control` (does the intervention control the behaviour, specifically and reliably?)
        and `mechanism` (is the subspace what the model itself uses?), the findings they rest on, and the tables
        `questions`, one row a finding, `cost`, and the data of the figures.
    """
    return examine(
        model,
        intervention,
        contrast,
        metric,
        refit=refit,
        neutral=neutral,
        checks=checks,
        natural=natural,
        rerouted=rerouted,
        budget=budget,
        pairs=pairs,
        margin=margin,
        seed=seed,
        progress=progress,
    ).report


def examine(
    model: HookedModel,
    intervention: Intervention,
    contrast: Contrast,
    metric: str | Metric,
    *,
    refit: tuple[Finder, Contrast | Activations] | None = None,
    neutral: Contrast | None = None,
    checks: Sequence[str | CaseCheck] | None = None,
    natural: Contrast | None = None,
    rerouted: Contrast | None = None,
    budget: float | str | None = None,
    pairs: int = 64,
    margin: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Examination:
    """`audit`, with the metric of every prompt under every condition, for studies that report more of it."""
    name, judge = name_of(metric), metric_for(metric, model)
    finder, acts = _refit(model, intervention, refit)
    limit = limit_of(budget)
    if margin is not None and not margin >= 0:
        raise ConfigError(f"margin={margin} was given. It is the half-width of no effect, in units of the metric.")
    case = Case(model, intervention, contrast, judge, name, 0.0, finder, acts, neutral, rerouted=rerouted, seed=seed)
    asked = CHECKS.names() if checks is None else checks
    if isinstance(asked, str) or any(isinstance(check, type) for check in asked):
        raise ConfigError(
            f"checks={asked!r} was given. Give a list of names, or of checks such as RandomControls(200)."
        )
    chosen: list[CaseCheck] = [CHECKS.load(check)() if isinstance(check, str) else check for check in asked]
    if limit is not None:
        chosen = [check.frugal() for check in chosen]
    if any(check.on == "natural" or check.line == "mechanism" for check in chosen):
        most = pairs if limit is None else min(pairs, few(len(contrast)))
        paired = natural or _paired(contrast, refit)
        if case.whole:
            case = replace(case, no_natural=case.whole)
        elif paired is not None:
            case = with_natural(case, paired, place_of, most)
    plan = planned(case, chosen, limit)
    if progress:
        print(plan.announced(), file=sys.stderr)
    started = time.perf_counter()
    ran = _run(case, plan, progress)
    _require_finite(ran, name)
    own = _margin(ran["contrast"][0], contrast) if margin is None else margin
    case = replace(case, clean=ran["contrast"][0], edited=ran["contrast"][1], margin=own)
    shared = time.perf_counter() - started
    values, findings, rows = dict[str, Tensor](), list[Finding](), list[dict[str, str]]()
    used = {"contrast": 2, "natural": 0}
    seconds: dict[str, float] = {}
    for item in plan.items:
        check, started = item.check, time.perf_counter()
        if item.reason:
            found: Sequence[Finding] = [case.untested(check, item.reason)]
        else:
            first = used[check.on]
            used[check.on] = first + len(item.conditions)
            values[check.name] = ran[check.on][first : used[check.on]]
            found = check.read(case, values[check.name])
        seconds[check.name] = time.perf_counter() - started
        findings += found
        rows += [_row(f, check.question) for f in found]
    lines = [_with_overlap(line, case) for line in verdict_lines(findings)]
    if progress:
        print(plan.spent(shared, seconds), file=sys.stderr)
    rows = [_row(line, "The verdict") for line in lines] + rows
    config = {"intervention": repr(intervention), "metric": name, "margin": own, "budget": limit or 0.0}
    provenance = Provenance.now(
        model=model.spec.name, fingerprint=model.fingerprint, data=contrast.name, config=config, seed=seed
    )
    tables = {
        "questions": Table.of(rows, "what each check asked and found"),
        "cost": plan.table(shared, seconds),
    }
    report = Report("audit", (*lines, *findings), tables | tables_of(case, values), provenance)
    return Examination(case, report, values)


def _with_overlap(line: Finding, case: Case) -> Finding:
    """The verdict on mechanism says so where it was asked of the prompts that the subspace was found on."""
    if line.name != "mechanism" or line.verdict == "not tested" or case.natural is None or case.acts is None:
        return line
    own = set(map(repr, case.acts.contrast.prompts))
    shared = sum(repr(prompt) in own for prompt in case.natural.prompts.prompts)
    note = f"{line.note}; {shared} of {len(case.natural)} natural prompts are among those it was found on"
    return replace(line, note=note) if shared else line


def _row(finding: Finding, question: str) -> dict[str, str]:
    answer = finding.note or finding.claim
    return {"check": finding.name, "question": question, "answer": answer, "verdict": finding.verdict}


def _run(case: Case, plan: Plan, progress: bool) -> dict[Prompts, Float[Tensor, "condition n"]]:
    """All conditions of all checks, in one set of shared passes for each set of prompts."""
    ran: dict[Prompts, Tensor] = {}
    sets: list[tuple[Prompts, Contrast, list[Condition]]] = [("contrast", case.contrast, [None, case.intervention])]
    if case.natural is not None:
        sets.append(("natural", case.natural.prompts, []))
    for on, prompts, own in sets:
        every = [*own, *(condition for item in plan.items if item.check.on == on for condition in item.conditions)]
        if every:
            ran[on] = outcomes(
                case.model, prompts.prompts, every, [case.metric], progress=progress, name=f"audit ({on})"
            )[0]
        else:
            ran[on] = torch.empty(0, len(prompts), dtype=torch.float64)
    return ran


def _require_finite(ran: Mapping[Prompts, Tensor], name: str) -> None:
    for on, values in ran.items():
        if bad := (~values.isfinite().all(0)).nonzero().flatten().tolist():
            raise DataError(
                f"{name} is not finite for the {on} prompts {bad[:5]}, so no mean of it means anything. Look for "
                "logits that overflow, or leave these prompts out."
            )


def _paired(contrast: Contrast, refit: tuple[Finder, Contrast | Activations] | None) -> Contrast | None:
    """Pairs of both labels among what audit was given: the prompts under audit, or those the subspace was found on."""
    given = [contrast]
    if refit is not None:
        given.append(refit[1].contrast if isinstance(refit[1], Activations) else refit[1])
    for prompts in given:
        labels: dict[int, set[int]] = {}
        for pair, label in zip(prompts.pairs, prompts.labels, strict=True):
            labels.setdefault(pair, set()).add(label)
        if sum(len(found) == 2 for found in labels.values()) >= 2:
            return prompts
    return None


def _refit(
    model: HookedModel, intervention: Intervention, refit: tuple[Finder, Contrast | Activations] | None
) -> tuple[Finder | None, Activations | None]:
    if refit is None:
        return None, None
    finder, source = refit
    if isinstance(source, Activations):
        return finder, source
    subspace = subspace_of(intervention)
    site, where = subspace.site, subspace.where
    if site is None or where is None:
        raise SiteError("The subspace does not say at which site and position it was found. Refit on activations.")
    return finder, model.capture(source, sites=site, where=where)


def _margin(clean: torch.Tensor, contrast: Contrast) -> float:
    labels = torch.tensor(contrast.labels)
    if len(labels.unique()) == 2:
        return 0.1 * abs(float(clean[labels == 1].mean() - clean[labels == 0].mean()))
    return 0.1 * float(clean.std()) if len(clean) > 1 else 0.0
