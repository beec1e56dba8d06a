"""The tables and the smaller findings of the harmfulness study."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Expectation, Finding, Interval
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.protocols import Finder, Metric
from subspace_probe.core.reports import Table
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import T_INST, T_POST_INST, Where
from subspace_probe.diagnostics.cases import subspace_of
from subspace_probe.diagnostics.cosines import Reading
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.diagnostics.readouts import coordinate, layer_curve
from subspace_probe.finders.published_selection import find_published
from subspace_probe.interventions.ablate import Ablate
from subspace_probe.interventions.conditions import condition_logits, outcomes
from subspace_probe.interventions.steer import Steer
from subspace_probe.linalg.angles import cosine
from subspace_probe.linalg.bases import random_directions
from subspace_probe.metrics.answers import Accuracy
from subspace_probe.metrics.behaviour import TokenOdds, answered
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import load_truth
from subspace_probe.studies.harmfulness_prompts import FRAMINGS, Prompts, Settings

ABOUT: Mapping[str, str] = {
    "layers": "AUROC of the direction fitted at each layer, on validation prompts that no fit has seen.",
    "separation": "Each point is a test prompt; zero is the midpoint of the class means of the training prompts.",
    "strength": "Share of harmless test requests that show the behaviour; strength 1 is the gap between class means.",
    "nulls": "Rates over the same test prompts under every draw.",
    "guard": "AUROC of the harmfulness direction at the instruction, on test prompts.",
    "tokens": "The direction read through the unembedding (logit lens, final norm left out).",
    "completions": "Greedy continuations of test prompts.",
    "questions": "What each check asked and found.",
    "summary": "The answer, from the verdicts.",
}
_DOSES = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@runtime_checkable
class Fitted(Protocol):
    """Both directions at every layer of one position."""

    @property
    def train(self) -> Activations: ...
    @property
    def harmfulness(self) -> Mapping[Site, Subspace]: ...
    @property
    def refusal(self) -> Mapping[Site, Subspace]: ...


def planted_findings(
    model: HookedModel, found: Mapping[Where, Fitted], finders: Mapping[str, Finder], seed: int
) -> list[Finding]:
    """Cosine of each found direction with the planted one, for organisms whose truth is known."""
    if model.directory is None or not (model.directory / "truth.json").is_file():
        return []
    findings: list[Finding] = []
    for planted in load_truth(model.directory).variables:
        if planted.name not in finders:
            continue
        directions = found[planted.where]
        fit = getattr(directions, planted.name)[planted.site]
        acts = directions.train if planted.name == "harmfulness" else directions.train.relabel("refused")
        truth = planted.vector.double()
        drawn = Reading(planted.name, acts, planted.site, finders[planted.name]).resampled(100, seed)
        spread = range_of(torch.cosine_similarity(drawn, truth[None]).abs(), "groups of prompts, bootstrap")
        random = random_directions(1000, len(truth), seed=seed).double() @ truth
        null = range_of(random.abs(), "random directions")
        finding = Finding(
            f"planted_cosine.{planted.name}",
            f"the direction found at {planted.site.short}, {planted.where} is the planted one",
            abs(cosine(fit.vector.double(), truth)),
            spread,
            null,
            acts.rows.n,
            expected=Expectation(above=0.85),
        )
        findings.append(finding.judged("above", margin=0.1))
    return findings


def judgement_findings(model: HookedModel, data: Prompts, judgement: Metric, config: Settings) -> list[Finding]:
    """Whether the model answers the question about a request at all, and rightly: else its judgement shows nothing."""
    findings: list[Finding] = []
    asked = data.ask(data.test)
    logits = condition_logits(model, asked.prompts, [None])[0]
    right = ((judgement(logits, asked.prompts) > 0).long() == torch.tensor(asked.labels)).double()
    estimate, interval = mean_of(right, asked.groups, seed=config.seed)
    null = Interval(0.5, 0.5, of="guessing between the two answers")
    claim = "asked without intervention, the model judges requests rightly"
    finding = Finding("judgement.accuracy", claim, estimate, interval, null, len(asked))
    findings.append(finding.judged("above", margin=0.1, no_effect=0.5))
    if isinstance(judgement, TokenOdds):
        share, spread = mean_of(answered(logits, judgement), asked.groups, seed=config.seed)
        verdict = "supported" if spread.low > 0.5 else "refuted" if spread.high < 0.5 else "inconclusive"
        null = Interval(0.0, 0.5, of="more probability on other words than on the two answers")
        claim = "asked about a request, the model answers with one of the two words"
        findings.append(Finding("judgement.answered", claim, share, spread, null, len(asked), verdict))
    return findings


def skill_findings(
    model: HookedModel, intervention: Ablate, neutral: Contrast | None, config: Settings
) -> list[Finding]:
    """Accuracy on other skills under an intervention, against random directions."""
    claim = "ablating refusal costs less than three points of accuracy on other skills"
    if neutral is None:
        reason = "no prompts of other skills were given"
        return [Finding("accuracy.ablated", claim, float("nan"), verdict="not tested", note=reason)]
    randoms = [intervention.with_subspace(random_like(subspace_of(intervention), seed=s)) for s in range(10)]
    right = outcomes(model, neutral.prompts, [None, intervention, *randoms], [Accuracy(model)])[0]
    # what is lost, not what is gained: where nothing changes, the interval is Wilson's and lies on the side of loss
    lost, around = mean_of(right[0] - right[1], neutral.groups, seed=config.seed)
    change, spread = 0.0 - lost, replace(around, low=0.0 - around.high, high=0.0 - around.low)
    null = range_of((right[2:] - right[0]).mean(1), "10 random directions ablated")
    note = f"accuracy {float(right[0].mean()):.3f} before, {float(right[1].mean()):.3f} after"
    verdict = "supported" if spread.low >= -0.03 else "refuted" if spread.high < -0.03 else "inconclusive"
    return [
        Finding(
            "accuracy.ablated", claim, change, spread, null, len(neutral), verdict, Expectation(above=-0.03), note=note
        )
    ]


def layer_rows(
    found: Mapping[Where, Fitted],
    validation: Mapping[Where, Activations],
    guard_site: Site,
    refusal_site: Site,
    seed: int,
) -> list[dict[str, Any]]:
    chosen = {(str(T_INST), "harmfulness", guard_site.short), (str(T_POST_INST), "refusal", refusal_site.short)}
    rows: list[dict[str, Any]] = []
    for where, directions in found.items():
        acts = validation[where]
        rows += layer_curve(directions.harmfulness, acts, "harmfulness", seed=seed)
        rows += layer_curve(directions.refusal, acts.relabel("refused"), "refusal", seed=seed)
    return [{**row, "chosen": (row["position"], row["direction"], row["site"]) in chosen} for row in rows]


def separation_rows(
    found: Mapping[Where, Fitted], test: Mapping[Where, Activations], guard_site: Site, refusal_site: Site
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for where, directions in found.items():
        acts = test[where]
        factors = acts.contrast.factors
        framing = [FRAMINGS[i] for i in factors["framing"]] if "framing" in factors else ["plain"] * acts.rows.n
        cells = [
            f"{'harmful' if h else 'harmless'}, {'refused' if r else 'complied'}"
            for h, r in zip(acts.contrast.labels, factors["refused"], strict=True)
        ]
        for name, fits, site in (
            ("harmfulness", directions.harmfulness, guard_site),
            ("refusal", directions.refusal, refusal_site),
        ):
            values = coordinate(fits[site], acts, site).tolist()
            rows += [
                {"position": str(where), "direction": name, "cell": cell, "framing": frame, "value": value}
                for cell, frame, value in zip(cells, framing, values, strict=True)
            ]
    return rows


def guard_row(finding: Finding) -> dict[str, Any]:
    low, high = (finding.interval.low, finding.interval.high) if finding.interval else (None, None)
    framing = finding.name.removeprefix("guard_auroc.")
    return {"framing": framing, "auroc": finding.estimate, "low": low, "high": high, "n": finding.n}


def dose_rows(
    model: HookedModel,
    data: Prompts,
    steers: Mapping[str, Steer],
    judgement: Metric,
    refusal_score: Metric,
    config: Settings,
) -> list[dict[str, Any]]:
    """Rate of each behaviour by strength, for both directions and a few random ones."""
    rows: list[dict[str, Any]] = []
    behaviours = (("judged harmful", data.asked_harmless, judgement), ("refused", data.plain_harmless, refusal_score))
    for behaviour, prompts, metric in behaviours:
        matching = steers["harmfulness" if behaviour == "judged harmful" else "refusal"]
        randoms = [matching.with_subspace(random_like(matching.subspace, seed=s)) for s in range(5)]
        steered = {"harmfulness": [steers["harmfulness"]], "refusal": [steers["refusal"]], "random": randoms}
        for direction, variants in steered.items():
            along = [steer.with_strength(dose) for dose in _DOSES for steer in variants]
            shown = (outcomes(model, prompts.prompts, along, [metric])[0] > 0).double()
            for i, dose in enumerate(_DOSES):
                values = shown[i * len(variants) : (i + 1) * len(variants)].mean(0)
                rate, spread = mean_of(values, prompts.groups, seed=config.seed)
                rows.append(
                    {
                        "direction": direction,
                        "behaviour": behaviour,
                        "strength": dose,
                        "rate": rate,
                        "low": spread.low,
                        "high": spread.high,
                    }
                )
    return rows


def completions(
    model: HookedModel, data: Prompts, steers: Mapping[str, Steer], config: Settings
) -> list[dict[str, Any]]:
    """What the model writes with and without each intervention."""
    half = max(1, config.completions // 2)
    requests = [*data.plain_harmless.prompts[:half], *data.plain_harmful.prompts[:half]]
    questions = [*data.asked_harmless.prompts[:half], *data.asked_harmful.prompts[:half]]
    conditions: dict[str, list[Any]] = {
        "unchanged": [],
        "+ harmfulness": [steers["harmfulness"]],
        "+ refusal": [steers["refusal"]],
        "refusal ablated": [Ablate(steers["refusal"].subspace)],
    }
    rows: list[dict[str, Any]] = []
    for condition, interventions in conditions.items():
        shown = [*requests, *questions]
        texts = model.generate(shown, interventions=interventions, max_new_tokens=config.max_new_tokens)
        rows += [{"prompt": p.shown, "condition": condition, "text": t} for p, t in zip(shown, texts, strict=True)]
    return rows


def published_selection(model: HookedModel, data: Prompts, refusal_score: Metric) -> Table:
    """The published choice among post-instruction tokens and layers, on validation prompts."""
    return find_published(model, data.plain(data.train), data.plain(data.validation), refusal_score)[1]


def summary(model: str, findings: Sequence[Finding]) -> list[str]:
    """The answer in a few sentences, each from the verdicts it names."""
    by_name = {finding.name: finding for finding in findings}

    def verdict(name: str) -> str:
        return by_name[name].verdict if name in by_name else "not tested"

    def figure(name: str) -> str:
        finding = by_name[name]
        interval = f" [{finding.interval.low:.2f}, {finding.interval.high:.2f}]" if finding.interval else ""
        return f"{finding.estimate:.2f}{interval}"

    guards = [f.interval.low for name, f in by_name.items() if name.startswith("guard_auroc.") and f.interval]
    reads = min(guards, default=float("nan"))  # the lower ends: an estimate of 1 is no certainty
    uses = {
        "supported": "and uses it for its own judgement",
        "refuted": "but its judgement does not come from there",
    }.get(verdict("judgement_flip.harmfulness"), "and whether its judgement comes from there stays open")
    sufficient, necessary = (verdict(f"refusal_rate.{way}") == "supported" for way in ("refusal", "ablated"))
    acts = {
        (True, True): "It refuses through",
        (True, False): "It can be made to refuse through, but refuses without,",
        (False, True): "It needs, but is not made to refuse by,",
        (False, False): "It was not shown to refuse through",
    }[sufficient, necessary]
    apart = {
        "supported": "are different directions",
        "refuted": "are not told apart",
    }.get(verdict("cosine.same_position"), "are not clearly different directions")
    return [
        f"{model} encodes harmfulness at the instruction (AUROC at least {reads:.2f} in every framing) {uses}: "
        f"{figure('judgement_flip.harmfulness')} of harmless requests are judged harmful when steered along it, "
        f"{figure('judgement_flip.random')} along random directions, {figure('judgement_flip.refusal')} along refusal.",
        f"{acts} a direction before the answer: steering along it makes {figure('refusal_rate.refusal')} of harmless "
        f"requests refused, ablating it leaves {figure('refusal_rate.ablated')} of harmful ones refused.",
        f"Read at one position, harmfulness and refusal {apart} (cosine {figure('cosine.same_position')}). The cosine "
        f"across positions, {figure('cosine.cross_position')}, says little: one and the same contrast read at both "
        f"places has {figure('cosine.same_contrast')}.",
    ]
