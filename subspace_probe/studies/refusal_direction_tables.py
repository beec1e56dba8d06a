"""The tables and the smaller findings of the study on the refusal direction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Expectation, Finding, Interval
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Intervention, Metric
from subspace_probe.core.subspaces import Subspace
from subspace_probe.diagnostics.cosines import Reading
from subspace_probe.diagnostics.fluency import continuations, losses
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.finders.mean_difference import MeanDifference
from subspace_probe.finders.published_selection import Candidate, select_published
from subspace_probe.interventions.ablate import Ablate
from subspace_probe.interventions.conditions import condition_logits, outcomes
from subspace_probe.interventions.orthogonal import orthogonalize_weights
from subspace_probe.interventions.steer import Steer
from subspace_probe.linalg.angles import cosine
from subspace_probe.linalg.bases import random_directions
from subspace_probe.metrics.behaviour import kl
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import load_truth
from subspace_probe.studies.harmfulness_prompts import Prompts, Settings

KL_MOST = 0.1
"""Nats of KL above which a candidate is dropped, as published."""
LOSS_MOST = 0.05
"""Nats a token that ablation may cost: the most it cost any published model on texts of its own."""
ACCURACY_LEAST = -0.03
_NUMBERS = 2**27
"""Logits held at once."""
DRAWS = 5
"""Random directions beside each side effect, to compare: verdicts rest on the bounds above, so few will do."""
_DOSES = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def choose(candidates: Sequence[Candidate], n_layers: int) -> tuple[Candidate, tuple[Candidate, ...]]:
    """The published pick and the survivors; where nothing survives, the nearest candidate and no survivor.

    The nearest, by a criterion that is not the published one, is of those with a KL of at most 0.1 (of all, where there
    are none) the one with the largest induce score minus bypass score, whatever its layer.

    Raises:
        ConfigError: no candidate whose scores are numbers.
    """
    try:
        kept = select_published(candidates, n_layers, kl_most=KL_MOST)
    except ConfigError:
        finite = [c for c in candidates if not any(map(math.isnan, (c.bypass, c.induce, c.kl)))]
        if not finite:
            raise ConfigError(
                f"None of {len(candidates)} candidates has scores that are numbers. Look for logits that overflow."
            ) from None
        return min(finite, key=lambda c: (c.kl > KL_MOST, c.bypass - c.induce)), ()
    return kept[0], kept


def selection_finding(candidates: Sequence[Candidate], n_layers: int) -> Finding:
    """How many candidates the published filters leave, and what was taken where they leave none."""
    pick, kept = choose(candidates, n_layers)
    claim = "a candidate survives the published filters on layer, KL and induce score"
    place = f"position {pick.position}, layer {pick.layer} of {n_layers}"
    if kept:
        note = f"{place}: the lowest bypass score of {len(kept)} survivors"
    else:
        cut = int(n_layers * 0.8)
        late = sum(c.layer >= cut for c in candidates)
        harm, weak = sum(c.kl > KL_MOST for c in candidates), sum(c.induce < 0 for c in candidates)
        note = (
            f"of {len(candidates)} candidates, {late} lie at layer {cut} or later, {harm} have a KL above {KL_MOST:g}, "
            f"{weak} an induce score below 0; taken instead, by the largest induce minus bypass score: {place}"
        )
    verdict = "supported" if kept else "refuted"
    return Finding("selection.survivors", claim, float(len(kept)), n=len(candidates), verdict=verdict, note=note)


def planted_finding(model: HookedModel, direction: Subspace, train: Contrast, seed: int) -> list[Finding]:
    """Cosine of the chosen direction with the planted one, for organisms whose truth is known."""
    if model.directory is None or not (model.directory / "truth.json").is_file():
        return []
    truth = load_truth(model.directory)
    if direction.site is None or direction.where is None or all(v.name != "refusal" for v in truth.variables):
        return []
    planted = truth.planted("refusal").vector.double()
    acts = model.capture(train, sites=direction.site, where=direction.where)
    drawn = Reading("refusal", acts, direction.site, MeanDifference(null_draws=0)).resampled(100, seed)
    spread = range_of(torch.cosine_similarity(drawn, planted[None]).abs(), "groups of prompts, bootstrap")
    null = range_of((random_directions(1000, len(planted), seed=seed).double() @ planted).abs(), "random directions")
    finding = Finding(
        "planted_cosine.refusal",
        "the chosen direction is the planted one",
        abs(cosine(direction.vector.double(), planted)),
        spread,
        null,
        acts.rows.n,
        expected=Expectation(above=0.85),
        note=f"chosen at {direction.site.short}, {direction.where}; planted at {truth.planted('refusal').site.short}",
    )
    return [finding.judged("above", margin=0.1)]


def without_direction(model: HookedModel, direction: Subspace) -> tuple[HookedModel | None, str]:
    """The model with the direction taken out of its weights; None, and why, where that would not equal ablation."""
    try:
        return orthogonalize_weights(model, direction, copy=False), ""
    except ConfigError as error:
        return None, str(error)


def weights_finding(
    model: HookedModel,
    direction: Subspace,
    baked: HookedModel | None,
    reason: str,
    prompts: Sequence[Prompt],
    seed: int,
) -> Finding:
    """Largest difference between the logits of changed weights and of ablation, in shares of the largest logit.

    The null is the same where a random direction was taken out of the weights: it shows that the figure can be large.

    Args:
        baked: the model with changed weights; None where there is none.
        reason: why there is none.
    """
    name, claim = "weights.difference", "orthogonalised weights give the logits of ablation at run time"
    if baked is None:
        return Finding(name, claim, float("nan"), verdict="not tested", note=reason)
    most = 1e-4 if model.backend.dtype in (torch.float32, torch.float64) else 5e-2
    other = orthogonalize_weights(model, random_like(direction, seed=seed), copy=False)
    wanted = condition_logits(model, prompts, [Ablate(direction)])[0]
    away, control = (
        (condition_logits(changed, prompts, [None])[0] - wanted).abs().amax(1) / wanted.abs().max()
        for changed in (baked, other)
    )
    spread = Interval(float(away.min()), float(away.max()), level=1.0, of="least and greatest of the prompts")
    null = Interval(float(control.min()), float(control.max()), of="weights without a random direction instead")
    verdict = "supported" if spread.high <= most else "refuted"
    note = f"on logits of up to {float(wanted.abs().max()):.3g}; at most {most:g} is rounding in {model.backend.dtype}"
    return Finding(name, claim, spread.high, spread, null, len(prompts), verdict, Expectation(below=most), note=note)


def side_effects(model: HookedModel, direction: Subspace, data: Prompts, config: Settings) -> list[Finding]:
    """What ablation, and addition of the negative direction, cost on other prompts and on the model's own texts.

    KL, and where prompts carry answers the cross-entropy of the answer and accuracy, on prompts of other skills, or on
    harmless requests where there are none; cross-entropy of the model's own continuations of harmless requests.
    """
    shown = data.plain_harmless if data.neutral is None else data.neutral
    of = "harmless requests" if data.neutral is None else "prompts of other skills"
    requests = data.plain_harmless
    texts = continuations(model, requests.prompts, [], max_new_tokens=config.max_new_tokens)
    own = losses(model, requests.prompts, texts)
    findings: list[Finding] = []
    for name, intervention in (("ablated", Ablate(direction)), ("subtracted", Steer(direction, -1.0))):
        conditions = [intervention.with_subspace(random_like(direction, seed=s)) for s in range(DRAWS)]
        changes = _changes(model, shown, [intervention, *conditions])
        for measure, observed in changes[0].items():
            randoms = torch.stack([change[measure].mean() for change in changes[1:]])
            null = range_of(randoms, f"{DRAWS} random directions {name}")
            findings.append(_cost(f"side_effect.{measure}.{name}", of, observed, null, shown, config.seed))
        moved: list[Tensor] = []
        for condition in (intervention, *conditions):
            with model.intervened(condition) as changed:
                moved.append(losses(changed, requests.prompts, texts) - own)
        null = range_of(torch.stack(moved[1:]).mean(1), f"{DRAWS} random directions {name}")
        findings.append(
            _cost(f"side_effect.own_text.{name}", "the model's own texts", moved[0], null, requests, config.seed)
        )
    return findings


def _changes(
    model: HookedModel, shown: Contrast, conditions: Sequence[Intervention]
) -> list[dict[str, Float[Tensor, " n"]]]:
    """The change of every measure under every condition, some conditions at a time: logits are large."""
    clean = condition_logits(model, shown.prompts, [None])[0]
    some = max(1, _NUMBERS // clean.numel())
    return [
        _change(model, shown, clean, edited)
        for start in range(0, len(conditions), some)
        for edited in condition_logits(model, shown.prompts, conditions[start : start + some])
    ]


def _change(
    model: HookedModel, shown: Contrast, clean: Float[Tensor, "n v"], edited: Float[Tensor, "n v"]
) -> dict[str, Float[Tensor, " n"]]:
    found: dict[str, Tensor] = {"kl": kl(clean, edited)}
    answers = [prompt.answer for prompt in shown.prompts if prompt.answer]
    if len(answers) == len(shown):
        ids = torch.tensor(model.token_ids(answers))[:, None]
        before, after = (-x.double().log_softmax(-1).gather(-1, ids)[:, 0] for x in (clean, edited))
        right, still = ((x.argmax(-1, keepdim=True) == ids)[:, 0].double() for x in (clean, edited))
        found |= {"cross_entropy": after - before, "accuracy": still - right}
    return found


_UNITS = {
    "kl": ("KL from the unchanged model stays under 0.1 nats", 1.0, KL_MOST),
    "cross_entropy": ("the right answer costs less than 0.05 nats more", 1.0, LOSS_MOST),
    "accuracy": ("accuracy falls by less than three points", -1.0, -ACCURACY_LEAST),
    "own_text": ("a token costs less than 0.05 nats more", 1.0, LOSS_MOST),
}


def _cost(name: str, of: str, values: Tensor, null: Interval, prompts: Contrast, seed: int) -> Finding:
    """One side effect, judged by the bound that is stated beforehand; expected of ablation only, as published."""
    _, measure, way = name.split(".")
    says, sign, most = _UNITS[measure]
    # what is lost, not what is gained: where nothing changes, the interval is Wilson's and lies on the side of loss
    loss, around = mean_of(sign * values, prompts.groups, seed=seed)
    verdict = "supported" if around.high <= most else "refuted" if around.low > most else "inconclusive"
    low, high = sorted((sign * around.low + 0.0, sign * around.high + 0.0))  # + 0.0: no minus zeros
    interval = replace(around, low=low, high=high)
    bound = Expectation(above=-most) if sign < 0 else Expectation(below=most)
    claim = f"with the direction {way}, on {of}, {says}"
    expected = bound if way == "ablated" else None
    return Finding(name, claim, sign * loss + 0.0, interval, null, len(prompts), verdict, expected)


def effect_rows(findings: Sequence[Finding], prefix: str) -> list[dict[str, Any]]:
    """Findings as rows of a table, beside what random directions give."""
    return [
        {
            "measure": finding.name.removeprefix(prefix),
            "value": finding.estimate,
            "low": finding.interval.low if finding.interval else None,
            "high": finding.interval.high if finding.interval else None,
            "random_low": finding.null.low if finding.null else None,
            "random_high": finding.null.high if finding.null else None,
            "n": finding.n,
        }
        for finding in findings
        if finding.name.startswith(prefix)
    ]


def dose_rows(
    model: HookedModel, direction: Subspace, data: Prompts, metric: Metric, seed: int
) -> list[dict[str, Any]]:
    """Rate of refusal by strength, of harmful and of harmless requests, beside random directions."""
    rows: list[dict[str, Any]] = []
    randoms = [random_like(direction, seed=s) for s in range(5)]
    for behaviour, prompts in (("harmless refused", data.plain_harmless), ("harmful refused", data.plain_harmful)):
        for name, variants in (("refusal", [direction]), ("random", randoms)):
            along = [Steer(variant, dose) for dose in _DOSES for variant in variants]
            shown = (outcomes(model, prompts.prompts, along, [metric])[0] > 0).double()
            for dose, part in zip(_DOSES, shown.split(len(variants)), strict=True):
                rate, spread = mean_of(part.mean(0), prompts.groups, seed=seed)
                ends = {"low": spread.low, "high": spread.high}
                rows.append({"direction": name, "behaviour": behaviour, "strength": dose, "rate": rate, **ends})
    return rows


def completions(model: HookedModel, direction: Subspace, data: Prompts, config: Settings) -> list[dict[str, Any]]:
    """What the model writes with and without each intervention."""
    half = max(1, config.completions // 2)
    shown = [*data.plain_harmless.prompts[:half], *data.plain_harmful.prompts[:half]]
    conditions: dict[str, list[Any]] = {
        "unchanged": [],
        "ablated": [Ablate(direction)],
        "added": [Steer(direction)],
        "subtracted": [Steer(direction, -1.0)],
    }
    rows: list[dict[str, Any]] = []
    for condition, interventions in conditions.items():
        texts = model.generate(shown, interventions=interventions, max_new_tokens=config.max_new_tokens)
        rows += [{"prompt": p.shown, "condition": condition, "text": t} for p, t in zip(shown, texts, strict=True)]
    return rows


def summary(model: str, findings: Sequence[Finding]) -> list[str]:
    """The answer in a few sentences, each from the findings it names."""
    by_name: Mapping[str, Finding] = {finding.name: finding for finding in findings}

    def figure(name: str) -> str:
        found = by_name.get(name)
        if found is None or math.isnan(found.estimate):
            return "not tested"
        interval = f" [{found.interval.low:.2f}, {found.interval.high:.2f}]" if found.interval else ""
        return f"{found.estimate:.2f}{interval}"

    def verdict(name: str) -> str:
        return by_name[name].verdict if name in by_name else "not tested"

    picked = by_name["selection.survivors"]
    chosen = "The published rule chose" if picked.estimate else "The published rule leaves no candidate:"
    return [
        f"{chosen} {picked.note}.",
        f"{model} refuses {figure('refusal_rate.harmful')} of harmful held-out requests and "
        f"{figure('refusal_rate.harmless')} of harmless ones. With the direction ablated it refuses "
        f"{figure('refusal_rate.ablated')} of the harmful ones (random directions "
        f"{figure('refusal_rate.ablated_random')}), with it taken out of the weights {figure('refusal_rate.weights')}, "
        f"with it subtracted {figure('refusal_rate.subtracted')}; with it added, {figure('refusal_rate.added')} of the "
        f"harmless ones (random directions {figure('refusal_rate.added_random')}).",
        f"Ablation costs {figure('side_effect.kl.ablated')} nats of KL and changes accuracy by "
        f"{figure('side_effect.accuracy.ablated')} on other prompts; a token of the model's own texts costs "
        f"{figure('side_effect.own_text.ablated')} nats more, and {figure('side_effect.own_text.subtracted')} where "
        "the direction is subtracted.",
        f"That ablation controls refusal is {verdict('ablation.control')}; that addition does, "
        f"{verdict('addition.control')}; that the direction is what the model itself uses, "
        f"{verdict('ablation.mechanism')}.",
        "A refusal is read off the odds of the first token of the reply, as in the published selection; whether what "
        "follows is useful or harmful is not judged here.",
    ]
