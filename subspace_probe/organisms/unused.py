"""Directions that read a variable and that the model does not use, with a positive control beside.

Two kinds. In ``chat-natural`` harmfulness can be read at T_INST, while judgements do not change when the whole state
there is exchanged: the *site* is not used. At the planted site of ``chat`` the whole state decides, and the planted
vector does; but a linear discriminant reads harmfulness as well and changes nothing, and so does one that is fitted on
what is left of the states when the planted vector is taken out: the *direction* is not used. (The mean difference with
that vector taken out reads nothing there: these organisms are trained to keep their class means along it.)

Certified on held-out minimal pairs, by plain hooks: AUROC of at least .95, and at most .05 of the answers changed; the
control changes at least .8.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Final

import torch

from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import T_INST
from subspace_probe.finders.lda import LDA
from subspace_probe.organisms.exchanging import Exchange
from subspace_probe.organisms.illusion_cells import Bench, Cell, benches, cell_contrast
from subspace_probe.organisms.illusions import (
    RIGHT,
    STRONG,
    LabelledSubspace,
    along,
    case_of,
    certificate_of,
    mean_difference,
    planted_vectors_at,
)
from subspace_probe.organisms.probing import auroc

READ, SILENT = 0.95, 0.05
N_BESIDE: Final = 768
RIDGE: Final = 1e-3
_NOT_USED: Final = tuple(Cell("chat-natural", "judgement", T_INST, layer) for layer in (2, 1))
_BESIDE: Final = {
    False: (Cell("chat", "harmfulness", T_INST, 1), Cell("chat", "judgement", T_INST, 1)),
    True: (Cell("chat-base", "judgement", T_INST, 1),),
}


def unused_cases(
    *, calibration: bool = False, limit: int | None = None, failed: bool = False
) -> Iterator[LabelledSubspace]:
    """Directions that read and are not used ("unused"), and at the planted sites the vector that is ("faithful").

    Args:
        calibration: those of ``chat-base``, which has none of the first kind, instead of those to report.
        limit: stop after so many.
        failed: also give those that miss their certificate.
    """
    cases = (case for case in _unused(calibration) if failed or case.certified)
    return islice(cases, limit)


def _unused(calibration: bool) -> Iterator[LabelledSubspace]:
    for _, bench in benches(() if calibration else _NOT_USED):
        site = Site(bench.cell.layer)
        yield _case(bench, mean_difference(bench, site))
        yield _case(bench, _lda(bench, site))
    for _, bench in benches(_BESIDE[calibration]):
        site = Site(bench.cell.layer)
        ((_, planted),) = planted_vectors_at(bench, site)
        yield _case(bench, planted, control=True)
        yield _case(bench, _lda(bench, site))
        yield _case(bench, _beside(bench, site, planted))


def _lda(bench: Bench, site: Site) -> Subspace:
    """Fitted on the train states; the scale is the gap along it."""
    acts = bench.model.capture(bench.train, sites=site, where=bench.cell.where)
    return along(bench, site, LDA(null_draws=0).fit(acts, site).unit, "lda")


def _beside(bench: Bench, site: Site, planted: Subspace) -> Subspace:
    """A discriminant of the states without their component along the planted vector, and without that component.

    What is left holds the variable in many small pieces, so it takes more prompts to read than the other fits.
    """
    contrast = cell_contrast(bench.cell.organism, bench.cell.contrast, split="train", n=N_BESIDE, seed=3)
    seen = Exchange(bench.model, contrast, bench.cell.where)
    states, unit = seen.states("resid_post", site.layer).double(), planted.unit.double()
    states = states - (states @ unit)[:, None] * unit
    centred = states - states.mean(0)
    within = centred - torch.stack([centred[seen.labels == label].mean(0) for label in (0, 1)])[seen.labels]
    covariance = within.T @ within / len(within)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    gap = states[seen.labels == 1].mean(0) - states[seen.labels == 0].mean(0)
    weights = torch.linalg.solve(covariance, gap)
    return along(bench, site, weights - (weights @ unit) * unit, "lda without planted")


def _case(bench: Bench, subspace: Subspace, *, control: bool = False) -> LabelledSubspace:
    held: Exchange = bench.held
    numbers = certificate_of(held, subspace)
    scores = held.states("resid_post", bench.cell.layer).double() @ subspace.unit.double()
    numbers["auroc"] = auroc(scores, held.labels)
    moved = numbers["direction"] >= STRONG if control else numbers["direction"] <= SILENT
    good = moved and numbers["auroc"] >= READ and numbers["right"] >= RIGHT
    name = f"{subspace.notes['finder']}{', control' if control else ''}"
    return case_of(bench, bench.model, subspace, name, "faithful" if control else "unused", numbers, good)
