"""The three tests of `sae_evaluation`: approximation, sparse control, interpretability."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import DataError
from subspace_probe.core.findings import Expectation, Finding, Interval
from subspace_probe.core.intervals import mean_of, range_of, shares
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.editing import SparseEdit, exchanged, sparse_edits
from subspace_probe.dictionaries.interpreting import Interpretation, f1_scores, interpret
from subspace_probe.dictionaries.supervised import SupervisedDictionary
from subspace_probe.studies.sae_evaluation_prompts import Bench, Columns, columns_of, partners

SKYLINE = 0.95
"""What supervised dictionaries are expected to reach by sufficiency."""
EDITED = 0.8
"""Agreement that supervised edits are expected to exceed, as published (except where no edit agrees already)."""
PAIR = 2
"""Features that a supervised edit changes: one out, one in."""
LEAST_KL = 0.05
"""Nats below which a patch moves nothing that an edit could be measured by."""
SHOWN = 8
"""Features shown of each dictionary."""
Found = tuple[list[Finding], dict[str, list[dict[str, Any]]]]


@runtime_checkable
class Settings(Protocol):
    """What the tests need of the study's settings."""

    @property
    def attributes(self) -> tuple[str, ...]: ...
    @property
    def budgets(self) -> tuple[int, ...]: ...
    @property
    def threshold(self) -> float: ...
    @property
    def draws(self) -> int: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Arms:
    """The dictionaries to be compared.

    Attributes:
        supervised: the skyline.
        mean_codes: the same with mean codes.
        saes: the learned ones and a random one, by name.
        randoms: random dictionaries: the null of what is learned.
        fits: supervised dictionaries of shuffled attributes: the null of the skyline.
    """

    supervised: SupervisedDictionary
    mean_codes: SupervisedDictionary
    saes: Mapping[str, SparseAutoencoder]
    randoms: Sequence[SparseAutoencoder]
    fits: Sequence[SupervisedDictionary]


# ---------------------------------------------------------------------------------------------------- 1 approximation
def approximation(
    bench: Bench, arms: Arms, train: Activations, test: Activations, config: Settings, expects: bool
) -> Found:
    """Test 1: the metric with states replaced by reconstructions, and by what reconstructions leave over."""
    a, columns = test.at(bench.site), columns_of(test.contrast, config.attributes)
    mean = train.at(bench.site).mean(0).expand_as(a)
    made = {"supervised": arms.supervised.reconstruct(columns), "supervised_mean": arms.mean_codes.reconstruct(columns)}
    made |= {name: sae.decode(sae.encode(a), a).to(a.dtype) for name, sae in arms.saes.items()}
    nulls = {
        "fits": [fit.reconstruct(columns) for fit in arms.fits],
        "randoms": [sae.decode(sae.encode(a), a).to(a.dtype) for sae in arms.randoms],
    }
    listed = [*made.values(), *nulls["fits"], *nulls["randoms"]]
    values = bench.run([a, mean, *listed, *(mean + a - x for x in listed)])[0]
    clean, without, rest = values[0], values[1], values[2:]
    enough, needed = rest[: len(listed)], rest[len(listed) :]
    groups, seed, n = test.groups, config.seed, len(a)

    def measured(name: str, claim: str, part: Tensor, null: Interval, expected: Expectation | None = None) -> Finding:
        estimate, interval = mean_of(part, groups, seed=seed)
        return Finding(name, claim, estimate, interval, null, n, expected=expected).judged("above", margin=0.05)

    clean_value, clean_interval = mean_of(clean, groups, seed=seed)
    mean_value, mean_interval = mean_of(without, groups, seed=seed)
    chance = Interval(mean_interval.low, mean_interval.high, mean_interval.level, "states replaced by their mean")
    findings = [
        Finding(
            "logit_difference.clean", "the model tells the answer from the foil at this state",
            clean_value, clean_interval, chance, n, note=f"{mean_value:.2f} with the state's mean in its place",
        ).judged("above", margin=0.1 * abs(clean_value), no_effect=mean_value)
    ]  # fmt: skip
    gap = clean - without
    rows: list[dict[str, Any]] = []
    split = (len(made), len(made) + len(arms.fits))
    for i, (name, states) in enumerate(made.items()):
        drawn = slice(*split) if name.startswith("supervised") else slice(split[1], None)
        of = f"{config.draws} dictionaries, " + ("attributes shuffled" if name.startswith("supervised") else "random")
        ratio, share = shares(enough, clean), shares(enough - without, gap)
        need = shares(clean - needed, gap)
        expected = Expectation(above=SKYLINE) if expects and name == "supervised" else None
        both = [
            measured(f"sufficiency.{name}", f"the model works on the reconstructions of {name}", ratio[i],
                     range_of(ratio[drawn].mean(-1), of), expected),
            measured(f"necessity.{name}", f"the model needs what {name} reconstructs", need[i],
                     range_of(need[drawn].mean(-1), of)),
        ]  # fmt: skip
        findings += both
        explained = 1 - float((a - states).double().square().sum() / (a - mean).double().square().sum())
        row: dict[str, Any] = {"dictionary": name, "variance_explained": explained}
        row["normalised"] = float(share[i].mean())
        for finding, key in zip(both, ("sufficiency", "necessity"), strict=True):
            low, high = (finding.interval.low, finding.interval.high) if finding.interval else (None, None)
            row |= {key: finding.estimate, f"{key}_low": low, f"{key}_high": high}
            row[f"{key}_null_high"] = finding.null.high if finding.null else None
        rows.append(row)
    sizes = [
        {"dictionary": name, "features": len(arms.supervised.names), "active": float(len(config.attributes))}
        for name in ("supervised", "supervised_mean")
    ] + [
        {"dictionary": name, "features": sae.d_sae, "active": float((sae.encode(a) != 0).double().sum(1).mean())}
        for name, sae in arms.saes.items()
    ]
    return findings, {"approximation": rows, "dictionaries": sizes, "attributes": _explained(arms, a, columns, config)}


def _explained(arms: Arms, a: Tensor, columns: Columns, config: Settings) -> list[dict[str, Any]]:
    """Held-out variance that one attribute's codes explain beyond the others', beside codes of shuffled attributes."""

    def share(fit: SupervisedDictionary, name: str) -> float:
        left = (a - fit.reconstruct(columns)).double()
        more = (left + fit.code(name, columns[name]).double()).square().sum() - left.square().sum()
        return float(more / (a - fit.mean).double().square().sum())

    rows: list[dict[str, Any]] = []
    size = float((a - arms.supervised.mean).norm(dim=1).mean())
    for name in config.attributes:
        null = range_of(torch.tensor([share(fit, name) for fit in arms.fits]), "attributes shuffled")
        norm = float(arms.supervised.codes[name].norm(dim=1).mean())
        row = {
            "attribute": name,
            "explained": share(arms.supervised, name),
            "null_low": null.low,
            "null_high": null.high,
        }
        rows.append({**row, "code_norm": norm, "state_norm": size})
    return rows


# ---------------------------------------------------------------------------------------------------- 2 sparse control
def sparse_control(
    bench: Bench, arms: Arms, train: Activations, test: Activations, config: Settings, expects: bool
) -> Found:
    """Test 2: change one attribute by few features; right is the most likely token of the whole patch."""
    findings: list[Finding] = []
    rows: list[dict[str, Any]] = []
    aware = _aware(arms, train, config)
    for name in config.attributes:
        columns = columns_of(test.contrast, config.attributes)
        here, there = partners(columns, name, seed=config.seed)
        if len(here) < 10:
            raise DataError(
                f"{len(here)} test prompts have a partner that differs in {name!r} and in no other attribute; 10 are "
                "the least. Add prompts, or leave the attribute out."
            )
        part = Bench(bench.model, bench.site, bench.where, test.contrast.take(here.tolist()))
        found, more = _edited(part, arms, test, name, (here, there), aware, config, expects)
        findings += found
        rows += more
    return findings, {"edits": rows}


Chooser = Callable[[str, str, Tensor, Tensor, Columns, Columns, int], SparseEdit]
Key = tuple[str, int, str]
"""Dictionary, features that may change, and how they are chosen."""


def _edited(
    part: Bench,
    arms: Arms,
    test: Activations,
    name: str,
    pairs: tuple[Int[Tensor, " m"], Int[Tensor, " m"]],
    aware: Chooser,
    config: Settings,
    expects: bool,
) -> tuple[list[Finding], list[dict[str, Any]]]:
    columns = columns_of(test.contrast, config.attributes)
    ends = [test.at(part.site)[rows] for rows in pairs]
    values = [{key: column[rows] for key, column in columns.items()} for rows in pairs]
    edits = _edits(arms, name, ends, values, aware, config)
    (source, target), (own, wanted) = ends, values
    tokens, apart = part.run([target, source])[1:]
    nulls: list[Tensor] = []
    if float((tokens[1] == tokens[0]).double().mean()) < EDITED or float(apart[1].mean()) >= LEAST_KL:
        nulls += [fit.edit(source, name, before=own[name], after=wanted[name]) for fit in arms.fits]
        nulls += [sparse_edits(sae, source, target, (PAIR,))[PAIR].states for sae in arms.randoms]
    measured = part.run([target, source, *(states for states, _ in edits.values()), *nulls])
    right, apart = (measured[1, 1:] == measured[1, 0]).double(), measured[2, 1:]
    closed = shares(apart[0] - apart, apart[0]) if float(apart[0].mean()) >= LEAST_KL else None
    groups, seed = torch.tensor(part.contrast.groups), config.seed
    no_edit = mean_of(right[0], groups, seed=seed)
    rates = {key: mean_of(right[1 + i], groups, seed=seed) for i, key in enumerate(edits)}
    skyline = rates["supervised", PAIR, "greedy"][0]
    rows = [_row(name, ("none", 0, "greedy"), no_edit, no_edit[0], skyline, 0.0, None)]
    for i, (key, (_, removed)) in enumerate(edits.items()):
        share = None if closed is None else float(closed[1 + i].mean())
        rows.append(_row(name, key, rates[key], no_edit[0], skyline, float(removed.mean()), share))
    findings: list[Finding] = []
    for arm in ("supervised", *arms.saes):
        key, first = (arm, PAIR, "greedy"), 1 + len(edits)
        drawn = slice(first, first + len(arms.fits)) if arm == "supervised" else slice(first + len(arms.fits), None)
        of = f"{config.draws} dictionaries, {'attributes shuffled' if arm == 'supervised' else 'random'}"
        hits = Finding(f"edit.{name}.{arm}", f"{PAIR} features of {arm} change {name} as the whole patch does: the "
                       "most likely token", *rates[key], None, len(source), "unaudited")  # fmt: skip
        note = f"{no_edit[0]:.2f} without an edit" + ("" if arm == "supervised" else f", {skyline:.2f} by supervision")
        findings.append(_agreement(hits, note, right[drawn].mean(1), of, no_edit[0], expects and arm == "supervised"))
        own_part = None if closed is None else (closed[1 + list(edits).index(key)], closed[drawn].mean(1))
        findings.append(_closed(f"closed.{name}.{arm}", hits.claim, own_part, of, apart[0], groups, seed))
    return findings, rows


def _edits(
    arms: Arms, name: str, ends: Sequence[Tensor], values: Sequence[Columns], aware: Chooser, config: Settings
) -> dict[Key, tuple[Tensor, Tensor]]:
    """States after every edit, and the share of the reconstruction that it removes."""
    (source, target), (own, wanted) = ends, values
    after = arms.supervised.edit(source, name, before=own[name], after=wanted[name])
    found: dict[Key, tuple[Tensor, Tensor]] = {
        ("supervised", PAIR, "greedy"): (after, arms.supervised.weights(own)[name])
    }
    for arm, sae in arms.saes.items():
        made = {(arm, k, "greedy"): edit for k, edit in sparse_edits(sae, source, target, config.budgets).items()}
        for k in (k for k in config.budgets if k >= PAIR):
            made[arm, k, "aware"] = aware(arm, name, source, target, own, wanted, k)
        found |= {key: (edit.states, edit.removed) for key, edit in made.items()}
    return found


def _agreement(
    found: Finding, note: str, null: Float[Tensor, " draw"], of: str, no_edit: float, expects: bool
) -> Finding:
    """Judged where prompts answer otherwise without an edit; elsewhere agreement shows nothing."""
    if no_edit >= EDITED:
        note += "; the answer does not change, so agreement on it cannot show an edit"
        return replace(found, verdict="not tested", note=note)
    expected = Expectation(above=EDITED) if expects else None
    found = replace(found, null=range_of(null, of), expected=expected)
    return replace(found.judged("above", margin=0.05, no_effect=no_edit), note=note)


def _closed(
    name: str, claim: str, part: tuple[Tensor, Tensor] | None, of: str, apart: Tensor, groups: Tensor, seed: int
) -> Finding:
    """Share of the KL between no edit and the whole patch that an edit takes away, beside that of the null."""
    claim = claim.replace("the most likely token", "all tokens")
    if part is None:
        note = f"the whole patch itself moves the prediction by {float(apart.mean()):.1g} nats only"
        return Finding(name, claim, float("nan"), verdict="not tested", note=note)
    share, interval = mean_of(part[0], groups, seed=seed)
    note = f"share of the {float(apart.mean()):.2g} nats of KL between no edit and the whole patch"
    found = Finding(name, claim, share, interval, range_of(part[1], of), len(apart), note=note)
    return found.judged("above", margin=0.05)


def _row(
    name: str,
    key: tuple[str, int, str],
    rate: tuple[float, Interval],
    low: float,
    high: float,
    removed: float,
    closed: float | None,
) -> dict[str, Any]:
    """One edit; affine is missing where supervision and no edit are too near to each other to tell."""
    (arm, budget, kind), (estimate, interval) = key, rate
    affine = (estimate - low) / (high - low) if abs(high - low) >= 0.1 else None
    return {
        "attribute": name, "dictionary": arm, "features": budget, "kind": kind, "accuracy": estimate,
        "low": interval.low, "high": interval.high, "affine": affine, "no_edit": low, "supervised": high,
        "closed": closed, "removed": removed,
    }  # fmt: skip


def _aware(arms: Arms, train: Activations, config: Settings) -> Chooser:
    """Edits that know what features mean: those of highest F1 for the old value out, for the new value in."""
    site = train.sites[0]
    columns = columns_of(train.contrast, config.attributes)
    seen = {name: column.unique() for name, column in columns.items()}
    scores: dict[str, dict[str, Tensor]] = {}
    for arm, sae in arms.saes.items():
        active = sae.encode(train.at(site)) != 0
        scores[arm] = {name: f1_scores(active, columns[name][:, None] == seen[name]) for name in columns}

    def edit(arm: str, name: str, source: Tensor, target: Tensor, own: Columns, wanted: Columns, k: int) -> SparseEdit:
        sae, f1 = arms.saes[arm], scores[arm][name].T
        picked: list[Tensor] = []
        for states, values in ((source, own[name]), (target, wanted[name])):
            at = (values[:, None] == seen[name]).long().argmax(1)
            ranked = torch.where(sae.encode(states) != 0, f1[at], -1.0).topk(k // 2, dim=1)
            picked.append(torch.where(ranked.values > 0, ranked.indices, -1))
        return exchanged(sae, source, target, torch.cat(picked, 1))

    return edit


# ------------------------------------------------------------------------------------------------ 3 interpretability
def interpretability(bench: Bench, arms: Arms, train: Activations, test: Activations, config: Settings) -> Found:
    """Test 3: properties are chosen on training prompts; F1 and causal effect are those of test prompts."""
    seed = config.seed
    a, states = test.at(bench.site), train.at(bench.site)
    columns, seen = columns_of(test.contrast, config.attributes), columns_of(train.contrast, config.attributes)
    mean = states.mean(0).expand_as(a)
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    changed: list[Tensor] = []
    findings: list[Finding] = []

    def tried(sae: SparseAutoencoder) -> tuple[Interpretation, Tensor, Tensor, Tensor]:
        active, tested = sae.encode(states) != 0, sae.encode(a) != 0
        named = interpret(active, seen)
        return named, active.any(0), tested, named.score(tested, columns)

    drawn = [(f1[alive] >= config.threshold).double().mean() for _, alive, _, f1 in map(tried, arms.randoms)]
    null = range_of(torch.stack(drawn), f"{config.draws} dictionaries, random")
    for arm, sae in arms.saes.items():
        named, alive, tested, f1 = tried(sae)
        good = (f1 >= config.threshold) & alive
        findings.append(_named(arm, good[alive], null, config))
        shown += _best(arm, named, f1, tested)
        counts = {"alive": int(alive.sum()), "interpretable": int(good.sum())}
        kinds = [{attribute for attribute, _ in named.properties[i].values} for i in good.nonzero().flatten().tolist()]
        of = {f"of_{name}": sum(kind == {name} for kind in kinds) for name in config.attributes}
        rows.append({"dictionary": arm, **counts, **of})
        changed += _kept(sae, states, a, good)
    clean, without, *rest = bench.run([a, mean, *changed])[0]
    for row, kept, removed in zip(rows, rest[::2], rest[1::2], strict=True):
        for key, part in (("kept", kept - without), ("removed", clean - removed)):
            estimate, interval = mean_of(shares(part, clean - without), test.groups, seed=seed)
            row |= {key: estimate, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return findings, {"features": shown, "interpretable": rows}


def _named(arm: str, good: Bool[Tensor, " alive"], null: Interval, config: Settings) -> Finding:
    estimate, interval = mean_of(good.double(), torch.arange(len(good)), seed=config.seed)
    claim = f"features of {arm} stand for attributes: F1 >= {config.threshold:g} on held-out prompts"
    interval = replace(interval, of=f"{len(good)} live features")
    note = f"{int(good.sum())} of {len(good)} live features"
    found = Finding(f"interpretable.{arm}", claim, estimate, interval, null, len(good), note=note)
    return found.judged("above", margin=0.02)


def _kept(
    sae: SparseAutoencoder, train: Float[Tensor, "m d"], a: Float[Tensor, "n d"], good: Bool[Tensor, " f"]
) -> list[Float[Tensor, "n d"]]:
    """The reconstruction with all but some features at their mean; the state with these features at their mean."""
    f, usual = sae.encode(a), sae.encode(train).mean(0)
    kept = sae.decode(torch.where(good, f, usual), a)
    removed = a + sae.gain(a) * (torch.where(good, usual - f, 0.0) @ sae.decoder)
    return [kept.to(a.dtype), removed.to(a.dtype)]


def _best(
    arm: str, named: Interpretation, f1: Float64[Tensor, " f"], active: Bool[Tensor, "n f"]
) -> list[dict[str, Any]]:
    order = f1.argsort(descending=True, stable=True)[:SHOWN].tolist()
    rates = active.double().mean(0)
    return [
        {"dictionary": arm, "feature": i, "property": str(named.properties[i]), "f1": float(f1[i]),
         "f1_train": float(named.f1[i]), "rate": float(rates[i])}
        for i in order
    ]  # fmt: skip
