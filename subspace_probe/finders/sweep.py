"""Find a direction without knowing the layer: every position, site and finder is tried, validation prompts choose.

The prompts are split by group into training, validation and test. Each subspace is fitted on training prompts, the one
with the best validation AUROC is taken, and because a best of many is high by chance, its score is compared with the
best of the same sweep under permuted labels. The test prompts are touched once, at the end.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

from tqdm.auto import tqdm

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError
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
        subspace: the chosen one, fitted on training prompts; `found` says whether it beats the permuted sweeps.
        table: one row a position, site and finder, best first: validation AUROC and d', and which was chosen.
    """

    subspace: Subspace
    table: Table


class _Cell(NamedTuple):
    """One thing to try: which activations (a position), at which site, with which finder."""

    place: int
    site: Site
    finder: Finder


def find(
    acts: Activations | Sequence[Activations],
    finder: Finder | Sequence[Finder],
    *,
    null_draws: int = 99,
    seed: int = 0,
    progress: bool = False,
) -> Found:
    """Choose a position, a site and a finder by validation AUROC.

    Args:
        acts: one row a prompt, at one or more sites; several for several positions, all of the same prompts.
        finder: one, or several.
        null_draws: sweeps under permuted labels behind the corrected p-value. Each fits every cell again.
        seed: of the split and the permutations.
        progress: show bars.

    Raises:
        ConfigError: nothing to try, or positions of different prompts.
        DataError: too few groups of prompts to split in three.
    """
    places = [acts] if isinstance(acts, Activations) else list(acts)
    finders = list(finder) if isinstance(finder, Sequence) else [finder]
    cells = [_Cell(i, site, f) for i, place in enumerate(places) for site in place.sites for f in finders]
    _require_comparable(places, cells)
    parts = [_thirds(place, seed) for place in places]
    fits, scores, null = _tried(parts, cells, null_draws, seed, progress)
    # AUROC saturates at 1 where prompts are few, so equal ones are told apart by d'
    order = sorted(range(len(cells)), key=lambda i: scores[i], reverse=True)
    best = order[0]
    p = (1 + sum(other >= scores[best] for other in null)) / (1 + len(null)) if null else float("nan")
    rows = [
        {
            "site": cells[i].site.short,
            "layer": cells[i].site.layer,
            "position": str(places[cells[i].place].where),
            "finder": cells[i].finder.name,
            "auroc": scores[i][0],
            "d_prime": scores[i][1],
            "chosen": i == best,
        }
        for i in order
    ]
    notes = {
        "validation_auroc": scores[best][0],
        "test_auroc": score(fits[best], parts[cells[best].place][2], cells[best].site)[0],
        "sites_tried": len(cells),
        "p_of_the_best": p,
    }
    subspace = replace(fits[best], found=fits[best].found and not p > 0.05, notes={**fits[best].notes, **notes})
    return Found(subspace, Table.of(rows, "validation AUROC of the direction fitted at each position, site and finder"))


def _require_comparable(places: Sequence[Activations], cells: Sequence[_Cell]) -> None:
    for cell in cells:
        if not isinstance(cell.finder, Finder) or "acts" not in inspect.signature(cell.finder.fit).parameters:
            raise ConfigError(
                f"{type(cell.finder).__name__} cannot be swept over activations. Finders that run the model (DAS, "
                "ActiveSubspace, WeightDelta) are called with fit(model, contrast, site, where)."
            )
    if not cells:
        raise ConfigError("A sweep over nothing was asked for. Give activations and at least one finder.")
    first = places[0].contrast
    for place in places[1:]:
        if place.contrast.prompts != first.prompts or place.contrast.labels != first.labels:
            raise ConfigError(
                f"The positions {places[0].where} and {place.where} hold other prompts or labels. Capture the same "
                "contrast at each."
            )
    n_groups = len(set(first.groups))
    if n_groups < LEAST_GROUPS:
        raise DataError(
            f"{first.name!r} has {n_groups} groups of prompts; choosing a site needs at least {LEAST_GROUPS}, "
            "to split them into training, validation and test. Add prompts."
        )


def _thirds(acts: Activations, seed: int) -> tuple[Activations, Activations, Activations]:
    """Half to train on, a quarter to choose by, a quarter to judge by."""
    train, rest = acts.split(0.5, seed=seed)
    validation, test = rest.split(0.5, seed=seed)
    for part in (train, validation, test):
        part.contrast.require_both_classes()
    return train, validation, test


def score(fit: Subspace, acts: Activations, site: Site) -> tuple[float, float]:
    """AUROC and d' of the first coordinate on some activations."""
    x = fit.coords(acts.at(site).double())[:, 0]
    labels = acts.labels
    positive, negative = x[labels == 1], x[labels == 0]
    spread = float(((positive.var() + negative.var()) / 2).sqrt()) if min(len(positive), len(negative)) > 1 else 0.0
    gap = float(positive.mean() - negative.mean())
    return auroc(x, labels), gap / spread if spread > 0 else 0.0


def _tried(
    parts: Sequence[tuple[Activations, ...]], cells: Sequence[_Cell], draws: int, seed: int, progress: bool
) -> tuple[list[Subspace], list[tuple[float, float]], list[tuple[float, float]]]:
    """Every cell's fit and validation score, and for each draw of permuted labels the best score over all cells.

    Cell by cell, so that of activations on disk the rows of one site are in memory at a time.
    """
    shown: Callable[..., Any] = tqdm
    fits: list[Subspace] = []
    scores: list[tuple[float, float]] = []
    best = [(-math.inf, -math.inf)] * draws
    relabelled: dict[tuple[int, int, int], list[Contrast]] = {}
    for place, site, finder in shown(cells, desc="sweep", unit="fit", disable=not progress, leave=False):
        train, validation = (part.only(site) for part in parts[place][:2])
        fits.append(finder.fit(train, site))
        scores.append(score(fits[-1], validation, site))
        for draw in range(draws):
            key = place, id(finder), draw
            if key not in relabelled:
                pair = (shuffled(finder, part, seed=seed + draw) for part in (train, validation))
                relabelled[key] = [part.contrast for part in pair]
            drawn, judged = (
                replace(part, contrast=contrast)
                for part, contrast in zip((train, validation), relabelled[key], strict=True)
            )
            best[draw] = max(best[draw], score(quick(finder).fit(drawn, site), judged, site))
    return fits, scores, best
