"""Is the same subspace found again on other prompts?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.activations import Activations, MemoryRows
from subspace_probe.core.errors import DataError
from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.intervals import range_of
from subspace_probe.core.protocols import Finder
from subspace_probe.core.sites import Site
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.finders.permuting import quick, shuffled
from subspace_probe.interventions.conditions import Condition


def split_half_overlaps(
    finder: Finder, acts: Activations, site: Site, *, draws: int, seed: int, permuted: bool = False
) -> Float[Tensor, " draws"]:
    """Similarity of subspaces found on two halves that share no group: signed cosine at rank one, else overlap."""
    found: list[float] = []
    empty = 0
    refitted = quick(finder)
    if isinstance(acts.rows, MemoryRows):  # what lies on disk is read a site at a time anyway
        acts = acts.only(site)
    for draw in range(seed, seed + draws):
        # labels are shuffled before the split, so that both halves share the shuffle and not only its marginals
        source = shuffled(finder, acts, seed=draw) if permuted else acts
        try:
            first, second = (refitted.fit(half, site) for half in source.split(0.5, seed=draw))
        except DataError:  # a half without rows of some class or cell: rare classes, few groups
            empty += 1
            continue
        found.append(first.cosine(second) if first.rank == 1 else first.overlap(second))
    if empty > draws // 2:
        raise DataError(
            f"{empty} of {draws} random halves of {acts.contrast.name!r} lack a class or a cell of the design. "
            "Add prompts of the rarer kind."
        )
    return torch.tensor(found, dtype=torch.float64)


@final
@dataclass(frozen=True)
class Stability(CaseCheck):
    """Cosine between directions (overlap between subspaces) found on two halves of the data.

    Null: the same under permuted labels. Expected near 1 for a direction that the data determine. Cannot see whether
    the direction is used.
    """

    name: ClassVar[str] = "stability"
    question: ClassVar[str] = "Is the same direction found again on other prompts?"

    draws: int = 40

    def missing(self, case: Case) -> str:
        """Needs the finder and what it was fitted on."""
        return case.no_refit

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Needs no pass."""
        return []

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """Split halves against split halves under permuted labels."""
        if case.finder is None or case.acts is None:
            return []
        site = case.subspace.site or case.acts.sites[0]
        halves = split_half_overlaps(case.finder, case.acts, site, draws=self.draws, seed=case.seed)
        null = split_half_overlaps(case.finder, case.acts, site, draws=self.draws, seed=case.seed, permuted=True)
        spread = range_of(halves, f"{self.draws} split halves")
        kind = "cosine" if case.subspace.rank == 1 else "overlap"
        found = Finding(
            "control.stability",
            "the same direction is found on disjoint halves of the prompts",
            float(halves.median()),
            Interval(spread.low, spread.high, of=spread.of),
            range_of(null, f"{self.draws} split halves under permuted labels"),
            case.acts.rows.n,
            note=f"median {kind} between halves {float(halves.median()):.3f}",
        )
        return [found.judged("above", margin=0.1)]
