"""The guard's report."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, Literal

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.reports import Provenance, Report
from subspace_probe.guard.examples import Shown
from subspace_probe.guard.guard import Labels, LatentGuard
from subspace_probe.guard.measured import Measured
from subspace_probe.guard.nulls import Nulls
from subspace_probe.guard.quality import (
    guard_table,
    probability_findings,
    reliability_table,
    separation_findings,
    slice_findings,
)


def guard_report(
    guard: LatentGuard,
    X: Shown,
    y: Labels | None = None,
    *,
    groups: Labels | None = None,
    train: Contrast | None = None,
    hard_benign: Shown | None = None,
    slices: Sequence[str] = (),
    source: str | None = None,
    base_rates: Sequence[float] = (0.001, 0.01, 0.1),
    refused: str | None = None,
    keywords: Literal["auto"] | Sequence[str] = "auto",
    latency: bool = True,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    start = perf_counter()
    measured = Measured.of(guard, X, y, groups, draws=draws, seed=seed)
    nulls = None
    if train is not None:
        nulls = Nulls.of(guard, train, guard.states(train), measured.rows, seed=seed)
    parts = measured.slices(slices)
    findings = [
        *separation_findings(measured, nulls),
        *probability_findings(measured),
        *slice_findings(measured, parts, nulls),
    ]
    tables = {"guard": guard_table(measured, parts), "reliability": reliability_table(measured)}
    provenance = Provenance.now(
        model=guard.model.spec.name, fingerprint=guard.model.fingerprint, data=measured.name, seed=seed,
        seconds=perf_counter() - start, config=guard.describe(),
    )  # fmt: skip
    return Report("latent_guard", tuple(findings), tables, provenance)
