"""What a patch restores of the difference between two prompts, beside what any other state or subspace restores."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.intervals import mean_of, range_of, shares
from subspace_probe.core.protocols import Metric
from subspace_probe.core.reports import Provenance, Report, Table, number
from subspace_probe.core.sites import SitesLike
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST, Where
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.interventions.patch import Align, Patch
from subspace_probe.interventions.sources import Source
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.models.hooked import HookedModel

Mode = Literal["denoise", "noise"]


def measure_patch(
    model: HookedModel,
    contrast: Contrast,
    sites: SitesLike,
    metric: str | Metric = "logit_difference",
    *,
    where: Where = LAST,
    source_where: Where | None = None,
    subspace: Subspace | None = None,
    outside: bool = False,
    align: Align | None = None,
    mode: Mode = "denoise",
    draws: int = 40,
    margin: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Exchange states within the pairs of a contrast, and measure what share of their difference that restores.

    The share is (patched - base) / (source - base), a ratio of means over pairs: 0 is nothing, 1 all of it. Its null
    is, for a subspace, the same exchange within `draws` random ones of its rank; for whole states, which no other
    subspace can stand for, the states of *other prompts of the base's own side*: what putting in a state disturbs.

    Args:
        contrast: complete pairs; the positive side is the clean one.
        sites: where; all of them at once.
        metric: of both sides alike, see `Contrast.sides`.
        where: tokens of the base; `source_where` those of the source, the same by default.
        subspace: exchange the component in it, or with `outside` the rest.
        align: as in `Patch`.
        mode: "denoise" puts clean states into corrupt prompts, "noise" the reverse.
        draws: how many; fewer than 39 leave the verdict "unaudited", since no range of 95 % can be told from them.
        margin: half-width of "nothing", as a share.

    Returns:
        A report with the findings `<metric>.source`, `.base`, `.patched` and `restored`, the table `effects`, one row a
        pair, and the table `nulls`.

    Raises:
        DataError: no complete pairs, or one only.
        ConfigError: a metric that does not tell the two sides apart.
    """
    clean, corrupt = contrast.sides()
    if mode not in ("denoise", "noise"):
        raise ConfigError(f"mode={mode!r} was given. Give 'denoise' (clean into corrupt) or 'noise' (the reverse).")
    source, base = (clean, corrupt) if mode == "denoise" else (corrupt, clean)
    name, judge = name_of(metric), metric_for(metric, model)
    taken = source_where or where
    acts = model.capture(source, sites=sites, where=taken)
    patch = Patch(Source.of(acts), where, subspace, outside, align)
    controls, of = _controls(model, patch, base, draws, seed)
    wholly = outcomes(model, source.prompts, [None], [judge])[0, 0]
    values = outcomes(model, base.prompts, [None, patch, *controls], [judge], progress=progress, name="patch")[0]
    gap = wholly - values[0]
    if float(gap.mean().abs()) <= 1e-6 * float((wholly.abs() + values[0].abs()).mean()) or not bool(gap.any()):
        raise ConfigError(
            f"{name} is the same for both sides ({number(float(wholly.mean()))}), so there is nothing to restore. "
            "Choose a metric that tells them apart, such as logit_difference with the two answers."
        )
    restored = shares(values[1:] - values[0], gap)
    means = {"source": wholly, "base": values[0], "patched": values[1]}
    findings = [_mean(f"{name}.{part}", name, part, given, base, seed) for part, given in means.items()]
    null = range_of(restored[1:].mean(1), of) if controls else None
    findings.append(_restored(restored[0], null, of, gap, base, margin=margin, seed=seed))
    tables = {"effects": _effects(base, means, name), "nulls": _nulls(findings[-1].estimate, restored[1:].mean(1), of)}
    config = {"patch": repr(patch), "metric": name, "mode": mode, "draws": draws, "margin": margin}
    provenance = Provenance.now(
        model=model.spec.name, fingerprint=model.fingerprint, data=contrast.name, config=config, seed=seed
    )
    return Report("patch", tuple(findings), tables, provenance)


def _controls(model: HookedModel, patch: Patch, base: Contrast, draws: int, seed: int) -> tuple[list[Condition], str]:
    """The patches that nothing should come of, and what they are; or none, and why."""
    if draws < 0:
        raise ConfigError(f"draws={draws} was given. Give 40, or 0 for no control.")
    if patch.subspace is not None:
        randoms = [random_like(patch.subspace, seed=s) for s in range(seed, seed + draws)]
        return [patch.with_subspace(random) for random in randoms], f"{draws} random subspaces of the same rank"
    if not draws:
        return [], "no control was asked for"
    own = model.capture(base, sites=list(patch.source.sites), where=patch.source.where or patch.where)
    counts = torch.bincount(own.prompt, minlength=len(base))
    if len(counts.unique()) > 1:
        return [], "no control: prompts with different numbers of tokens cannot stand for each other"
    # so few prompts can be exchanged in so few ways
    ways = math.factorial(min(len(base), 8) - 1) if len(base) > 1 else 0
    found: list[Condition] = []
    for s in range(seed, seed + min(draws, ways)):
        found.append(replace(patch, source=Source.resampled(own, seed=s)))
    return found, f"states of other prompts of the same side, {len(found)} draws"


def _mean(name: str, metric: str, part: str, values: Tensor, base: Contrast, seed: int) -> Finding:
    claim = {"source": "of the prompts that give their states", "base": "of the prompts that are patched, before"}
    estimate, interval = mean_of(values, base.groups, seed=seed)
    return Finding(
        name, f"{metric} {claim.get(part, 'of the prompts that are patched, after')}", estimate, interval, n=len(values)
    )


def _restored(
    shares: Tensor, null: Interval | None, of: str, gap: Tensor, base: Contrast, *, margin: float, seed: int
) -> Finding:
    estimate, interval = mean_of(shares, base.groups, seed=seed)
    note = f"{estimate:.0%} of the difference between the sides; "
    note += f"{of}: {null.low:.0%} to {null.high:.0%}" if null else of
    _, apart = mean_of(gap, base.groups, seed=seed)
    if apart.low <= 0 <= apart.high:
        note += "; the difference itself may be 0 on these prompts, so a share of it means little"
        interval = None
    claim = "the patch restores more of the difference than the control does"
    found = Finding("restored", claim, estimate, interval, null, len(base), note=note)
    return found.judged("above", margin=margin)


def _effects(base: Contrast, means: dict[str, Tensor], name: str) -> Table:
    columns = ("prompt", *means)
    rows = zip(base.prompts, *(values.tolist() for values in means.values()), strict=True)
    return Table(columns, tuple((row[0].shown, *row[1:]) for row in rows), f"{name} of each pair")


def _nulls(observed: float, drawn: Tensor, of: str) -> Table:
    rows: Sequence[tuple[str, str, str, float]] = [
        *(("patch", "share restored", of.split(",")[0], value) for value in drawn.tolist()),
        ("patch", "share restored", "observed", observed),
    ]
    return Table(("direction", "behaviour", "kind", "value"), tuple(rows), "share of the difference restored")
