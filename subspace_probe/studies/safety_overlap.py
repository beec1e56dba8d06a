"""Overlaps of the study `safety_subspaces`: of what updates changed in the weights, and of activations."""

from itertools import combinations
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Expectation, Finding, Interval
from subspace_probe.core.intervals import range_of
from subspace_probe.core.sites import Site
from subspace_probe.diagnostics.mode_overlap import activation_overlap, mode_overlap, planted_overlap
from subspace_probe.interventions.update_projection import as_matrix
from subspace_probe.linalg.modes import Modes, modes
from subspace_probe.linalg.nulls import overlap_null
from subspace_probe.models.checkpoints import rewritten
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.safety_projection import Lineage

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
_RESAMPLED = 20
_SIMILAR = 0.1
"""Half-width, about chance, of an overlap that counts as none."""


@runtime_checkable
class Settings(Protocol):
    """What is needed of the study's settings."""

    @property
    def share(self) -> float: ...
    @property
    def draws(self) -> int: ...
    @property
    def seed(self) -> int: ...


def weight_findings(lineage: Lineage, config: Settings) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Overlap of every two updates, averaged over the matrices that both changed; rows for every share of energy."""
    spectra = {update: _spectra(lineage, update) for update in lineage.updates}
    rows: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for a, b in combinations(spectra, 2):
        both = [(spectra[a][name], spectra[b][name]) for name in spectra[a] if name in spectra[b]]
        if not both:
            continue
        for share in sorted({*SHARES, config.share}):
            each = [mode_overlap(*pair, share) for pair in both]
            value, chance = (float(torch.tensor(v).double().mean()) for v in zip(*[(o.value, o.chance) for o in each]))  # noqa: B905
            rows.append(
                {"pair": f"{a}, {b}", "share": share, "overlap": value, "chance": chance, "matrices": len(each)}
            )
            if share == config.share:
                findings.append(_weights_finding(a, b, [o.value for o in each], both, config))
    return findings, rows


def _spectra(lineage: Lineage, update: str) -> dict[str, Modes]:
    found = {name: modes(as_matrix(change)) for name, change in lineage.updates[update].items() if change.ndim > 1}
    return {name: spectrum for name, spectrum in found.items() if spectrum is not None}


def _weights_finding(
    a: str, b: str, values: list[float], pairs: list[tuple[Modes, Modes]], config: Settings
) -> Finding:
    """The mean over matrices; its null has random subspaces of the same ranks in every matrix."""
    drawn = torch.zeros(config.draws, dtype=torch.float64)
    for row, (first, second) in enumerate(pairs):
        k, l = first.holding(config.share), second.holding(config.share)  # noqa: E741
        identity = torch.eye(first.left.shape[1], dtype=torch.float64)
        drawn += overlap_null(identity, k, l, n=config.draws, seed=config.seed + row) / len(pairs)
    each = torch.tensor(values, dtype=torch.float64)
    estimate = float(each.mean())
    spread = Interval(float(each.min()), float(each.max()), level=1.0, of=f"{len(each)} matrices, least and greatest")
    null = range_of(drawn, f"{config.draws} random subspaces of the same ranks")
    verdict = "supported" if estimate > null.high else "refuted" if estimate < null.low else "inconclusive"
    claim = f"the {a} and the {b} update share more of their leading output directions than random ones"
    return Finding(f"overlap.weights.{a}.{b}", claim, estimate, spread, null, len(values), verdict)


def activation_findings(
    model: HookedModel, lineage: Lineage, test: Contrast, config: Settings
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Overlap of what useful and harmful prompts vary along, at the last token of a late layer, in every checkpoint."""
    site = Site(int(0.65 * model.spec.n_layers))
    rows: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for stage in ("aligned", *("base" if update == "alignment" else update for update in lineage.updates)):
        states = _states(model, lineage, stage, test, site)
        found = activation_overlap(*states, config.share)
        estimates = [_resampled(states, config, draw) for draw in range(_RESAMPLED)]
        spread = range_of(torch.tensor(estimates), f"{_RESAMPLED} resamplings of the prompts")
        k, l = found.centred.ranks  # noqa: E741
        identity = torch.eye(states[0].shape[1], dtype=torch.float64)
        chance = overlap_null(identity, k, l, n=config.draws, seed=config.seed)
        null = range_of(chance, f"{config.draws} random subspaces of the same ranks")
        note = f"at {site.short}, ranks {k} and {l}; uncentred {found.uncentred.value:.2f}" + (
            ", a mean artefact" if found.mean_artefact else ""
        )
        claim = f"{stage}: useful and harmful prompts vary along the same directions"
        finding = Finding(
            f"overlap.activations.{stage}", claim, found.centred.value, spread, null, len(test), note=note
        )
        findings.append(finding.judged("above", margin=_SIMILAR, no_effect=found.centred.chance))
        rows.append(
            {
                "model": stage, "site": site.short, "centred": found.centred.value, "uncentred": found.uncentred.value,
                "chance": found.centred.chance, "rank useful": k, "rank harmful": l, "mean cosine": found.mean_cosine,
                "mean artefact": found.mean_artefact,
            }
        )  # fmt: skip
    return findings, rows


def _states(model: HookedModel, lineage: Lineage, stage: str, test: Contrast, site: Site) -> tuple[Tensor, Tensor]:
    with rewritten(model) as write:
        if stage != "aligned":
            sign, update = (-1.0, "alignment") if stage == "base" else (1.0, stage)
            for name, change in lineage.updates[update].items():
                before = lineage.aligned[name]
                write(name, (before.double() + sign * change.double()).to(before.dtype))
        acts = model.capture(test, sites=site)
        x = acts.at(site).cpu().double()
    return x[acts.labels == 0], x[acts.labels == 1]


def _resampled(states: tuple[Tensor, Tensor], config: Settings, draw: int) -> float:
    generator = torch.Generator().manual_seed(config.seed + 1 + draw)
    drawn = [x[torch.randint(len(x), (len(x),), generator=generator)] for x in states]
    return activation_overlap(drawn[0], drawn[1], config.share).centred.value


def planted_findings(config: Settings) -> list[Finding]:
    """The measure on data made for it: orthogonal variation about one mean, which uncentred looks like overlap."""
    found = planted_overlap(seed=config.seed)
    repeats = [planted_overlap(seed=config.seed + 1 + draw) for draw in range(20)]
    centred, uncentred = (
        range_of(torch.tensor(values), "20 drawn data sets")
        for values in ([r.centred.value for r in repeats], [r.uncentred.value for r in repeats])
    )
    return [
        Finding(
            "instrument.centred",
            "two sets of states that vary along orthogonal directions about one mean do not overlap, centred",
            found.centred.value,
            centred,
            uncentred,
            verdict="supported" if centred.high <= 0.05 else "refuted",
            expected=Expectation(below=0.05),
        ),
        Finding(
            "instrument.mean_artefact",
            "uncentred they do, and that is flagged as an artefact of the mean",
            float(found.mean_artefact) * found.uncentred.value,
            uncentred,
            centred,
            verdict="supported" if all(r.mean_artefact for r in repeats) else "refuted",
            expected=Expectation(above=0.5),
        ),
    ]
