"""Every check that applies to an intervention, in shared passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import SiteError
from subspace_probe.core.findings import Finding
from subspace_probe.core.protocols import Finder, Intervention, Metric
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.diagnostics import CHECKS
from subspace_probe.diagnostics.cases import Case, CaseCheck, subspace_of
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
    margin: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Run the checks that separate a real effect from one that any direction would have.

    Args:
        refit: the finder and what it was fitted on, for checks that find the subspace again (label permutation,
            stability). Without it they are reported as not tested.
        neutral: prompts whose behaviour should not change, for the specificity check.
        checks: names from `CHECKS`, or checks with settings of their own; default all.
        margin: half-width of "no effect" in units of the metric. Default: a tenth of the clean gap between the
            classes, or of the metric's standard deviation where the prompts are of one class.
        seed: of every draw.

    Returns:
        A report with findings `control.*` and the table `questions`, one row a finding.
    """
    return examine(
        model,
        intervention,
        contrast,
        metric,
        refit=refit,
        neutral=neutral,
        checks=checks,
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
    margin: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Examination:
    """`audit`, with the metric of every prompt under every condition, for studies that report more of it."""
    name, judge = name_of(metric), metric_for(metric, model)
    finder, acts = _refit(model, intervention, refit)
    case = Case(model, intervention, contrast, judge, name, 0.0, finder, acts, neutral, seed)
    asked = CHECKS.names() if checks is None else checks
    chosen: list[CaseCheck] = [CHECKS.load(check)() if isinstance(check, str) else check for check in asked]
    reasons = {check.name: check.missing(case) for check in chosen}
    plans: dict[str, Sequence[Condition]] = {
        check.name: check.conditions(case) for check in chosen if not reasons[check.name]
    }
    planned = [None, intervention, *(condition for plan in plans.values() for condition in plan)]
    ran = outcomes(model, contrast.prompts, planned, [judge], progress=progress, name="audit")[0]
    own = _margin(ran[0], contrast) if margin is None else margin
    case = replace(case, clean=ran[0], edited=ran[1], margin=own)
    values = dict(zip(plans, ran[2:].split([len(plan) for plan in plans.values()]), strict=True))
    findings: list[Finding] = []
    rows: list[dict[str, str]] = []
    for check in chosen:
        if reasons[check.name]:
            found: Sequence[Finding] = [case.untested(check.name, check.question, reasons[check.name])]
        else:
            found = check.read(case, values[check.name])
        findings += found
        rows += [
            {"check": f.name, "question": check.question, "answer": f.note or f.claim, "verdict": f.verdict}
            for f in found
        ]
    config = {"intervention": repr(intervention), "metric": name, "margin": own, "conditions": len(planned)}
    provenance = Provenance.now(
        model=model.spec.name, fingerprint=model.fingerprint, data=contrast.name, config=config, seed=seed
    )
    tables = {"questions": Table.of(rows, "what each check asked and found")}
    return Examination(case, Report("audit", tuple(findings), tables, provenance), values)


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
