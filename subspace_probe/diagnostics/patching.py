"""What a patch restores of the difference between two prompts, beside what any other state or subspace restores."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.intervals import mean_of, range_of
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
    draws: int = 20,
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
        draws: how many; 0 leaves the verdict "unaudited".
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
    gap = (wholly - values[0]).mean()
    if not float(gap.abs()) > 1e-9:
        raise ConfigError(
            f"{name} is the same for both sides ({number(float(wholly.mean()))}), so there is nothing to restore. "
            "Choose a metric that tells them apart, such as logit_difference with the two answers."
        )
    shares = _shares(values[1:] - values[0], wholly - values[0])
    means = {"source": wholly, "base": values[0], "patched": values[1]}
    findings = [_mean(f"{name}.{part}", name, part, given, base, seed) for part, given in means.items()]
    null = range_of(shares[1:].mean(1), of) if controls else None
    findings.append(_restored(patch, shares[0], null, base, margin=margin, seed=seed))
    tables = {"effects": _effects(base, means, name), "nulls": _nulls(findings[-1].estimate, shares[1:].mean(1), of)}
    config = {"patch": repr(patch), "metric": name, "mode": mode, "draws": draws, "margin": margin}
    provenance = Provenance.now(
        model=model.spec.name, fingerprint=model.fingerprint, data=contrast.name, config=config, seed=seed
    )
    return Report("patch", tuple(findings), tables, provenance)


def _controls(model: HookedModel, patch: Patch, base: Contrast, draws: int, seed: int) -> tuple[list[Condition], str]:
    if patch.subspace is not None:
        randoms = [random_like(patch.subspace, seed=s) for s in range(seed, seed + draws)]
        return [patch.with_subspace(random) for random in randoms], f"{draws} random subspaces of the same rank"
    where = patch.source.where or patch.where
    own = model.capture(base, sites=list(patch.source.sites), where=where) if draws else None
    of = f"states of other prompts of the same side, {draws} draws"
    if own is None or len(base) < 2:
        return [], of
    return [replace(patch, source=Source.resampled(own, seed=s)) for s in range(seed, seed + draws)], of


def _shares(change: Tensor, gap: Tensor) -> Tensor:
    """Per-prompt values whose mean is the ratio of means, and whose spread is its own to first order."""
    ratio = change.mean(-1, keepdim=True) / gap.mean()
    return ratio + (change - ratio * gap) / gap.mean()


def _mean(name: str, metric: str, part: str, values: Tensor, base: Contrast, seed: int) -> Finding:
    claim = {"source": "of the prompts that give their states", "base": "of the prompts that are patched, before"}
    estimate, interval = mean_of(values, base.groups, seed=seed)
    return Finding(
        name, f"{metric} {claim.get(part, 'of the prompts that are patched, after')}", estimate, interval, n=len(values)
    )


def _restored(
    patch: Patch, shares: Tensor, null: Interval | None, base: Contrast, *, margin: float, seed: int
) -> Finding:
    estimate, interval = mean_of(shares, base.groups, seed=seed)
    note = f"{estimate:.0%} of the difference between the sides"
    note += f"; {null.of}: {null.low:.0%} to {null.high:.0%}" if null else ""
    claim = "the patch restores more of the difference than the control does"
    found = Finding("restored", claim, estimate, interval, null, len(base), note=note)
    return found.judged("apart", margin=margin)


def _effects(base: Contrast, means: dict[str, Tensor], name: str) -> Table:
    columns = ("prompt", *means)
    rows = zip(base.prompts, *(values.tolist() for values in means.values()), strict=True)
    return Table(columns, tuple((row[0].shown, *row[1:]) for row in rows), f"{name} of each pair")


def _nulls(observed: float, drawn: Tensor, of: str) -> Table:
    rows: Sequence[tuple[str, str, str, float]] = [
        *(("patch", "share restored", of.rsplit(",")[0], value) for value in drawn.tolist()),
        ("patch", "share restored", "observed", observed),
    ]
    return Table(("direction", "behaviour", "kind", "value"), tuple(rows), "share of the difference restored")
