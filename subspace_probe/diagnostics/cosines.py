"""Is this cosine anything? Every cosine between directions, beside what it would be for reasons of no interest.

Two directions read at different tokens may have a cosine near 0 because the tokens differ, and read at the same token
one near 1 because the token is the same. In the published tensors of one such comparison, position alone explains the
figure. So the controls are the same contrast read at both positions, and both contrasts read at the same position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import DataError
from subspace_probe.core.findings import Finding, Interval, judge
from subspace_probe.core.intervals import range_of
from subspace_probe.core.protocols import Finder
from subspace_probe.core.reports import Table
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.diagnostics.similarity import CHANCE, state_covariance
from subspace_probe.diagnostics.stability import split_half_overlaps
from subspace_probe.finders.permuting import quick
from subspace_probe.linalg.angles import cosine
from subspace_probe.linalg.nulls import cosine_null


@final
@dataclass(frozen=True, eq=False)
class Reading:
    """One contrast read at one position: what a direction was fitted on.

    Attributes:
        label: the name of the contrast, as figures show it.
        acts: activations at that position; all readings that are compared come from the same prompts.
    """

    label: str
    acts: Activations
    site: Site
    finder: Finder

    def fit(self) -> Subspace:
        """The direction."""
        return self.finder.fit(self.acts, self.site)

    def resampled(self, draws: int, seed: int) -> Float[Tensor, "draws d"]:
        """The direction on prompts drawn again by group; the same prompts for every reading of the same seed."""
        groups = self.acts.groups
        _, index = groups.unique(return_inverse=True)
        members = [(index == group).nonzero().flatten() for group in range(int(index.max()) + 1)]
        generator = torch.Generator().manual_seed(seed)
        found: list[Tensor] = []
        finder, acts = quick(self.finder), self.acts.only(self.site)
        for _ in range(draws):
            picked = torch.randint(len(members), (len(members),), generator=generator).tolist()
            rows = torch.cat([members[group] for group in picked])
            try:
                found.append(finder.fit(acts.take(rows), self.site).vector.double())
            except DataError:  # a sample without rows of some cell
                found.append(torch.full((self.acts.rows.width(self.site),), torch.nan, dtype=torch.float64))
        return torch.stack(found)


def chance_range(a: Reading, b: Reading, *, draws: int = 1000, seed: int) -> Interval:
    """Cosines of random pairs of directions, each with the covariance of its own position's states."""
    first, second = (state_covariance(reading.acts, reading.site) for reading in (a, b))
    return range_of(cosine_null(first, covariance_b=second, n=draws, seed=seed), CHANCE)


def compare(
    readings: dict[str, Reading],
    pairs: Sequence[tuple[str, str, str, str]],
    *,
    draws: int = 200,
    seed: int = 0,
) -> tuple[list[Finding], Table]:
    """Cosines between readings, with bootstrap intervals and two nulls.

    The finding's null is what the cosine would be were the two the same direction: split halves of one reading. The
    table adds the chance range, from the data's own covariance.

    Args:
        readings: by name; all on the same prompts.
        pairs: (finding name, reading a, reading b, kind in words).
    """
    drawn = {name: reading.resampled(draws, seed) for name, reading in readings.items()}
    fits = {name: reading.fit() for name, reading in readings.items()}
    halves = {name: split_half_overlaps(r.finder, r.acts, r.site, draws=30, seed=seed) for name, r in readings.items()}
    findings: list[Finding] = []
    rows: list[dict[str, object]] = []
    for name, left, right, kind in pairs:
        a, b = readings[left], readings[right]
        value = cosine(fits[left].vector.double(), fits[right].vector.double())
        resampled = torch.cosine_similarity(drawn[left], drawn[right])
        spread = range_of(resampled[resampled.isfinite()], "groups of prompts, bootstrap")
        same = range_of(
            torch.cat([halves[left], halves[right]]), "split halves of one direction: the cosine were they the same"
        )
        chance = chance_range(a, b, seed=seed)
        note = (
            f"{kind}; by chance, with the covariance of these states, {chance.low:+.2f} to {chance.high:+.2f}; "
            f"were they one direction, {same.low:+.2f} to {same.high:+.2f}"
        )
        claim = f"{a.label} at {a.acts.where} and {b.label} at {b.acts.where} are different directions"
        finding = Finding(name, claim, value, spread, same, a.acts.rows.n, note=note)
        # opposite vectors span the same line, so the claim is judged on the absolute cosine
        line = replace(spread, low=-spread.high, high=-spread.low) if value < 0 else spread
        findings.append(replace(finding, verdict=judge(line, same, "below", margin=0.0, no_effect=1.0)))
        rows.append(
            {
                "a": a.label,
                "b": b.label,
                "position_a": str(a.acts.where),
                "position_b": str(b.acts.where),
                "kind": kind,
                "cosine": value,
                "low": spread.low,
                "high": spread.high,
                "null_low": chance.low,
                "null_high": chance.high,
            }
        )
    return findings, Table.of(rows, "each cosine between directions, with its range by chance")
