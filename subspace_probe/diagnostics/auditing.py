"""Every check that applies to an intervention, in shared passes."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import SiteError
from subspace_probe.core.findings import Finding
from subspace_probe.core.protocols import Finder, Intervention, Metric
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.diagnostics import CHECKS
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.models.hooked import HookedModel


def audit(
    model: HookedModel,
    intervention: Intervention,
    contrast: Contrast,
    metric: str | Metric,
    *,
    refit: tuple[Finder, Contrast | Activations] | None = None,
    neutral: Contrast | None = None,
    checks: Sequence[str] | None = None,
    margin: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Run the checks that separate a real effect from one that any direction would have.

    Args:
        refit: the finder and what it was fitted on, for checks that find the subspace again (label permutation,
            stability). Without it they are reported as not tested.
        neutral: prompts whose behaviour should not change, for the specificity check.
        checks: names from `CHECKS`; default all.
        margin: half-width of "no effect" in units of the metric. Default: a tenth of the clean gap between the
            classes, or of the metric's standard deviation where the prompts are of one class.
        seed: of every draw.

    Returns:
        A report with findings `control.*` and the table `questions`, one row a finding.
    """
    name, judge = name_of(metric), metric_for(metric, model)
    finder, acts = _refit(model, intervention, refit)
    case = Case(model, intervention, contrast, judge, name, 0.0, finder, acts, neutral, seed)
    chosen: list[CaseCheck] = [CHECKS.load(check)() for check in (CHECKS.names() if checks is None else checks)]
    reasons = {check.name: check.missing(case) for check in chosen}
    plans: dict[str, Sequence[Condition]] = {
        check.name: check.conditions(case) for check in chosen if not reasons[check.name]
    }
    planned = [None, intervention, *(condition for plan in plans.values() for condition in plan)]
    values = outcomes(model, contrast.prompts, planned, [judge], progress=progress, name="audit")[0]
    clean, edited = values[0], values[1]
    own = _margin(clean, contrast) if margin is None else margin
    case = replace(case, clean=clean, edited=edited, margin=own)
    findings: list[Finding] = []
    rows: list[dict[str, str]] = []
    start = 2
    for check in chosen:
        if reasons[check.name]:
            found: Sequence[Finding] = [case.untested(check.name, check.question, reasons[check.name])]
        else:
            end = start + len(plans[check.name])
            found, start = check.read(case, values[start:end]), end
        findings += found
        rows += [
            {"check": f.name, "question": check.question, "answer": f.note or f.claim, "verdict": f.verdict}
            for f in found
        ]
    config = {"intervention": repr(intervention), "metric": name, "margin": own, "conditions": len(planned)}
    provenance = Provenance.now(
        model=model.spec.name, fingerprint=model.fingerprint, data=contrast.name, config=config, seed=seed
    )
    return Report(
        "audit", tuple(findings), {"questions": Table.of(rows, "what each check asked and found")}, provenance
    )


def _refit(
    model: HookedModel, intervention: Intervention, refit: tuple[Finder, Contrast | Activations] | None
) -> tuple[Finder | None, Activations | None]:
    if refit is None:
        return None, None
    finder, source = refit
    if isinstance(source, Activations):
        return finder, source
    site, where = intervention.subspace.site, intervention.subspace.where
    if site is None or where is None:
        raise SiteError("The subspace does not say at which site and position it was found. Refit on activations.")
    return finder, model.capture(source, sites=site, where=where)


def _margin(clean: torch.Tensor, contrast: Contrast) -> float:
    labels = torch.tensor(contrast.labels)
    if len(labels.unique()) == 2:
        return 0.1 * abs(float(clean[labels == 1].mean() - clean[labels == 0].mean()))
    return 0.1 * float(clean.std()) if len(clean) > 1 else 0.0
