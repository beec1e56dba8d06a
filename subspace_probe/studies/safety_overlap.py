"""Overlaps of the study `safety_subspaces`: of what updates changed in the weights, and of activations.

Token embeddings and the unembedding are left out of those of the weights: one side of them is the vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Expectation, Finding, Interval
from subspace_probe.core.intervals import range_of
from subspace_probe.core.sites import Site
from subspace_probe.diagnostics.mode_overlap import ModeOverlap, activation_overlap, mode_overlap, planted_overlap
from subspace_probe.interventions.update_projection import as_matrix
from subspace_probe.linalg.modes import Modes, modes
from subspace_probe.linalg.nulls import isotropic_overlap_null
from subspace_probe.linalg.resampling import cluster_index, cluster_weights
from subspace_probe.models.checkpoints import rewritten, vocabulary_weights
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


def weight_findings(
    model: HookedModel, lineage: Lineage, config: Settings
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Overlap of every two updates, averaged over the matrices that both changed; rows for every share of energy.

    Token embeddings and the unembedding are no part of it.
    """
    left_out = vocabulary_weights(model)
    spectra = {update: _spectra(lineage, update, left_out) for update in lineage.updates}
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
                findings.append(_weights_finding(a, b, each, [first.left.shape[1] for first, _ in both], config))
    return findings, rows


def _spectra(lineage: Lineage, update: str, left_out: frozenset[str]) -> dict[str, Modes]:
    changes = lineage.updates[update].items()
    found = {name: modes(as_matrix(change)) for name, change in changes if change.ndim > 1 and name not in left_out}
    return {name: spectrum for name, spectrum in found.items() if spectrum is not None}


def _weights_finding(a: str, b: str, overlaps: list[ModeOverlap], widths: list[int], config: Settings) -> Finding:
    """The mean over matrices; its null has random subspaces of the same ranks in every matrix."""
    alike = Counter((d, *overlap.ranks) for d, overlap in zip(widths, overlaps, strict=True))
    drawn = torch.zeros(config.draws, dtype=torch.float64)
    for row, ((d, k, l), many) in enumerate(alike.items()):  # noqa: E741
        values = isotropic_overlap_null(d, k, l, n=many * config.draws, seed=config.seed + row)
        drawn += values.view(many, -1).sum(0) / len(overlaps)
    each = torch.tensor([overlap.value for overlap in overlaps], dtype=torch.float64)
    estimate = float(each.mean())
    spread = Interval(float(each.min()), float(each.max()), level=1.0, of=f"{len(each)} matrices, least and greatest")
    null = range_of(drawn, f"{config.draws} random subspaces of the same ranks")
    verdict = "supported" if estimate > null.high else "refuted" if estimate < null.low else "inconclusive"
    claim = f"the {a} and the {b} update share more of their leading output directions than random ones"
    return Finding(f"overlap.weights.{a}.{b}", claim, estimate, spread, null, len(overlaps), verdict)


def activation_findings(
    model: HookedModel, lineage: Lineage, test: Contrast, config: Settings
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Overlap of what useful and harmful prompts vary along, at the last token of a late layer, in every checkpoint."""
    site = Site(int(0.65 * model.spec.n_layers))
    rows: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for stage in ("aligned", *("base" if update == "alignment" else update for update in lineage.updates)):
        acts = _captured(model, lineage, stage, test, site)
        sides = [acts.labels == label for label in (0, 1)]
        states = [acts.at(site).cpu().double()[side] for side in sides]
        found = activation_overlap(states[0], states[1], config.share)
        spread = resampled(states, [acts.groups[side] for side in sides], config)
        k, l = found.centred.ranks  # noqa: E741
        chance = isotropic_overlap_null(states[0].shape[1], k, l, n=config.draws, seed=config.seed)
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


def _captured(model: HookedModel, lineage: Lineage, stage: str, test: Contrast, site: Site) -> Activations:
    with rewritten(model) as write:
        if stage != "aligned":
            sign, update = (-1.0, "alignment") if stage == "base" else (1.0, stage)
            for name, change in lineage.updates[update].items():
                before = lineage.aligned[name]
                write(name, (before.double() + sign * change.double()).to(before.dtype))
        return model.capture(test, sites=site)


def resampled(states: Sequence[Tensor], groups: Sequence[Tensor], config: Settings) -> Interval:
    """Of the centred overlap of two sets of states, by resampling groups of prompts within each."""
    if min(len(each.unique()) for each in groups) < 2:
        return Interval(float("nan"), float("nan"), of="one group only of a class: no interval")
    drawn: list[list[Tensor]] = []
    for row, (x, each) in enumerate(zip(states, groups, strict=True)):
        members = cluster_index("resampled", len(x), each)
        times = torch.cat(list(cluster_weights(int(members.max()) + 1, _RESAMPLED, seed=2 * config.seed + row)))
        drawn.append([x.repeat_interleave(many, 0) for many in times[:, members].long()])
    found = [activation_overlap(a, b, config.share).centred.value for a, b in zip(*drawn, strict=True)]
    return range_of(torch.tensor(found), f"{_RESAMPLED} resamplings of groups of prompts")


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
