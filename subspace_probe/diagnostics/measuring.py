"""The effect of an intervention on a behaviour, per prompt and on average. Unaudited: see `audit`."""

import torch

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import mean_of
from subspace_probe.core.protocols import Intervention, Metric
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.models.hooked import HookedModel


def measure(
    model: HookedModel, intervention: Intervention, contrast: Contrast, metric: str | Metric, *, seed: int = 0
) -> Report:
    """Measure a behaviour with and without an intervention.

    Args:
        metric: a name from `METRICS`, or a callable from last-token logits and prompts to one number a prompt.
        seed: of the bootstrap.

    Returns:
        A report with the findings `<metric>.clean`, `.edited`, `.effect` and `.wrong_way` (the share of prompts moved
        against the mean effect), all "unaudited", and the table `effects`, one row a prompt.
    """
    name, judge = name_of(metric), metric_for(metric, model)
    clean, edited = outcomes(model, contrast.prompts, [None, intervention], [judge])[0]
    change = edited - clean
    against = (change * torch.sign(change.mean()) < 0).double()
    claims = {
        "clean": (clean, f"{name} without the intervention"),
        "edited": (edited, f"{name} under {intervention!r}"),
        "effect": (change, f"{intervention!r} changes {name}"),
        "wrong_way": (against, "prompts are moved against the mean effect"),
    }
    findings: list[Finding] = []
    for part, (values, claim) in claims.items():
        estimate, interval = mean_of(values, contrast.groups, seed=seed)
        findings.append(Finding(f"{name}.{part}", claim, estimate, interval, n=len(contrast)))
    rows = zip(contrast.prompts, contrast.labels, clean.tolist(), edited.tolist(), strict=True)
    table = Table(
        ("prompt", "label", "clean", "edited"),
        tuple((prompt.shown, label, a, b) for prompt, label, a, b in rows),
        f"{name} of each prompt, without and with the intervention",
    )
    provenance = Provenance.now(
        model=model.spec.name,
        fingerprint=model.fingerprint,
        data=contrast.name,
        config={"intervention": repr(intervention), "metric": name},
        seed=seed,
    )
    return Report("measure", tuple(findings), {"effects": table}, provenance)
