"""Find a direction without knowing the layer: every site is tried, the choice is made on validation prompts only.

The prompts are split by group into training, validation and test. Each site's subspace is fitted on training prompts,
the site with the best validation AUROC is taken, and because a best of many is high by chance, its score is compared
with the best of the same sites under permuted labels. The test prompts are touched once, at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from tqdm.auto import tqdm

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import DataError
from subspace_probe.core.protocols import Finder
from subspace_probe.core.reports import Table
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.permuting import quick, shuffled
from subspace_probe.linalg.ranking import auroc

LEAST_GROUPS = 8
"""Fewest groups of prompts that three parts with both classes can be drawn from."""


@final
@dataclass(frozen=True, eq=False)
class Found:
    """What a sweep found.

    Attributes:
        subspace: at the chosen site, fitted on training prompts; `found` says whether it beats the permuted sweeps.
        table: one row a site: validation AUROC and d', and whether it was chosen.
    """

    subspace: Subspace
    table: Table


def find(
    acts: Activations,
    finder: Finder,
    *,
    null_draws: int = 99,
    seed: int = 0,
    progress: bool = False,
) -> Found:
    """Choose a site of `acts` by validation AUROC and fit the finder there.

    Args:
        acts: one row a prompt, at one or more sites.
        null_draws: sweeps under permuted labels behind the corrected p-value.
        seed: of the split and the permutations.

    Raises:
        DataError: too few groups of prompts to split in three.
    """
    n_groups = len(set(acts.contrast.groups))
    if n_groups < LEAST_GROUPS:
        raise DataError(
            f"{acts.contrast.name!r} has {n_groups} groups of prompts; choosing a site needs at least {LEAST_GROUPS}, "
            "to split them into training, validation and test. Add prompts."
        )
    train, rest = acts.split(0.5, seed=seed)
    validation, test = rest.split(0.5, seed=seed)
    for part in (train, validation, test):
        part.contrast.require_both_classes()
    fits = {site: finder.fit(train, site) for site in acts.sites}
    scores = {site: score(fit, validation, site) for site, fit in fits.items()}
    best = max(scores, key=lambda site: scores[site])
    null = _permuted_best(train, validation, finder, acts.sites, null_draws, seed, progress)
    # AUROC saturates at 1 where prompts are few, so equal ones are told apart by d'
    p = (1 + sum(other >= scores[best] for other in null)) / (1 + len(null)) if null else float("nan")
    rows = [
        {"site": site.short, "layer": site.layer, "auroc": a, "d_prime": d, "chosen": site == best}
        for site, (a, d) in scores.items()
    ]
    notes = {
        "validation_auroc": scores[best][0],
        "test_auroc": score(fits[best], test, best)[0],
        "sites_tried": len(scores),
        "p_of_the_best": p,
    }
    subspace = replace(fits[best], found=fits[best].found and not p > 0.05, notes={**fits[best].notes, **notes})
    return Found(subspace, Table.of(rows, "validation AUROC of the direction fitted at each site"))


def score(fit: Subspace, acts: Activations, site: Site) -> tuple[float, float]:
    """AUROC and d' of the first coordinate on some activations."""
    x = fit.coords(acts.at(site).double())[:, 0]
    labels = acts.labels
    positive, negative = x[labels == 1], x[labels == 0]
    spread = float(((positive.var() + negative.var()) / 2).sqrt()) if min(len(positive), len(negative)) > 1 else 0.0
    gap = float(positive.mean() - negative.mean())
    return auroc(x, labels), gap / spread if spread > 0 else 0.0


def _permuted_best(
    train: Activations,
    validation: Activations,
    finder: Finder,
    sites: Sequence[Site],
    draws: int,
    seed: int,
    progress: bool,
) -> list[tuple[float, float]]:
    """The best validation score over all sites, under permuted labels."""
    refitted = quick(finder)
    bar: Callable[..., Any] = tqdm
    best: list[tuple[float, float]] = []
    for draw in bar(range(seed, seed + draws), desc="permuted sweeps", disable=not progress, leave=False):
        parts = [shuffled(finder, part, seed=draw) for part in (train, validation)]
        best.append(max(score(refitted.fit(parts[0], site), parts[1], site) for site in sites))
    return best
