"""The tables and the smaller findings of the study on rerouting."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Expectation, Finding
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.reports import Report, Table
from subspace_probe.core.sites import Site, resid_post
from subspace_probe.core.tokens import LAST
from subspace_probe.diagnostics.eligibility import LEAST
from subspace_probe.diagnostics.ladder import MARGIN
from subspace_probe.diagnostics.rungs import observe
from subspace_probe.diagnostics.search_comparison import RANDOM, TARGET, Searches
from subspace_probe.diagnostics.similarity import state_covariance
from subspace_probe.finders.linear_probe import LinearProbe
from subspace_probe.finders.mean_difference import MeanDifference
from subspace_probe.finders.permuting import permuted_labels
from subspace_probe.interventions.conditions import condition_logits
from subspace_probe.interventions.objectives import replaced
from subspace_probe.interventions.reroute import Reroute
from subspace_probe.interventions.targets import HalfSpace
from subspace_probe.linalg.angles import cosine
from subspace_probe.linalg.nulls import cosine_null
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.rerouting_prompts import Ground

READ = Expectation(above=LEAST)
HIDDEN = Expectation(below=LEAST)
NEVER = Expectation(below=0.0)
ALWAYS = Expectation(above=0.95)
_DRAWS = 200


def probed(acts: Activations, seed: int) -> list[dict[str, Any]]:
    """How well a probe reads the class at every layer, cross-validated, and how near it is to the mean difference."""
    rows: list[dict[str, Any]] = []
    for site in acts.sites:
        mean, probe = MeanDifference(null_draws=0).fit(acts, site), LinearProbe(null_draws=0).fit(acts, site)
        covariance = state_covariance(acts, site)
        chance = range_of(cosine_null(covariance, covariance_b=covariance, n=1000, seed=seed), "random directions")
        accuracy = probe.notes["cv_accuracy"]
        rows.append({
            "site": site.short, "layer": site.layer, "cv_accuracy": accuracy,
            "eligible": accuracy is not None and accuracy >= LEAST,
            "cosine": cosine(mean.vector.double(), probe.vector.double()), "cosine_low": chance.low,
            "cosine_high": chance.high,
        })  # fmt: skip
    return rows


def read_findings(model: HookedModel, acts: Activations, ground: Ground, seed: int) -> list[Finding]:
    """How well the mean difference reads the class of held-out prompts, at every layer."""
    held = model.capture(ground.clean, sites=resid_post(), where=LAST)
    known = {} if ground.truth is None else ground.truth.behaviour.get("class read at the read-out token", {})
    found: list[Finding] = []
    for site in acts.sites:
        finding = _read(acts, held, site, seed)
        if (certified := known.get(f"layer {site.layer}")) is not None:
            finding = replace(finding, expected=READ if certified >= LEAST else HIDDEN)
        found.append(finding)
    return found


def _read(acts: Activations, held: Activations, site: Site, seed: int) -> Finding:
    """Accuracy of the side of the midpoint between the class means; the null permutes the held-out labels."""
    fitted = acts.at(site).double()
    high, low = (fitted[acts.labels == label].mean(0) for label in (1, 0))
    says = ((held.at(site).double() - (high + low) / 2) @ (high - low) > 0).long()
    estimate, interval = mean_of((says == held.labels).double(), held.groups, seed=seed)
    drawn = torch.stack([(says == permuted_labels(held, seed=seed + draw)).double().mean() for draw in range(_DRAWS)])
    null = range_of(drawn, f"{_DRAWS} permutations of the held-out labels")
    claim = f"a mean difference reads the class at {site.short}, on held-out prompts"
    found = Finding(f"read.L{site.layer}", claim, estimate, interval, null, len(says))
    return found.judged("above", margin=0.1, no_effect=0.5)


def expected_rates(climbed: Report, ground: Ground) -> list[Finding]:
    """The ladder's findings, with what the exhaustive truth of an organism lets expect of them."""
    if ground.truth is None or ground.suffixes is None:
        return list(climbed.findings)
    lifted = ground.truth.behaviour["flipped by moving the state there"]
    found: list[Finding] = []
    for finding in climbed.findings:
        site, level, measure = finding.name.rsplit(".", 2)
        expected = finding.expected
        if (level, measure) == ("token", "flipped"):
            expected = ALWAYS if ground.suffixes.flipped else NEVER
        elif (level, measure) == ("activation", "flipped") and lifted[f"layer {Site.parse(site).layer}"] == 1.0:
            expected = ALWAYS
        found.append(replace(finding, expected=expected))
    return found


def percentile_findings(climbed: Report, moved: Contrast, seed: int) -> list[Finding]:
    """How far out rerouted states lie, in percentiles of clean ones, whose own mean is one half."""
    if "prompts" not in climbed.tables:
        return []
    rows = climbed.tables["prompts"].records()
    uniform = torch.rand(999, len(moved), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    null = range_of(uniform.mean(1), f"as many clean states, {len(uniform)} draws")
    found: list[Finding] = []
    for site, level in dict.fromkeys((row["site"], row["level"]) for row in rows):
        values = torch.tensor([row["percentile"] for row in rows if (row["site"], row["level"]) == (site, level)])
        estimate, interval = mean_of(values.double(), moved.groups, seed=seed)
        claim = f"at the {level} level, rerouted states lie farther out than clean ones (Mahalanobis percentile)"
        finding = Finding(f"{site}.{level}.percentile", claim, estimate, interval, null, len(values))
        found.append(finding.judged("above", margin=0.1, no_effect=0.5))
    return found


def answer_findings(searches: Searches, target: HalfSpace, ground: Ground, seed: int) -> list[Finding]:
    """Not only another answer but the right one, and the planted tokens where some were planted."""
    model, moved = searches.model, ground.moved
    foils = [prompt.foil for prompt in moved.prompts if prompt.foil]
    found: list[Finding] = []
    if len(foils) == len(moved):
        wanted = torch.tensor(model.token_ids(foils))
        edited = condition_logits(model, moved.prompts, [Reroute(target)])[0]
        put = searches.found[TARGET]
        with_tokens = logits_with(model, searches.contrast, put.positions, put.ids)
        found += [
            _right(level, logits.argmax(1), wanted, moved, seed)
            for level, logits in (("activation", edited), ("token", with_tokens))
        ]
    if ground.suffixes is None or not ground.suffixes.planted:
        return found
    planted = torch.tensor(ground.suffixes.planted)
    same, other = ((searches.found[name].ids == planted).all(1) for name in (TARGET, RANDOM))
    hit = _beside("token.planted", "the search finds the planted tokens", same, other, "random search", moved, seed)
    sure = ground.suffixes.planted_flips == 1.0
    return [*(replace(f, expected=ALWAYS) if f.name == "token.right" and sure else f for f in found),
            replace(hit, expected=ALWAYS)]  # fmt: skip


def _right(level: str, said: Int[Tensor, " n"], wanted: Int[Tensor, " n"], moved: Contrast, seed: int) -> Finding:
    """How often the answer is the prompt's own other one; the null deals the other answers out at random."""
    estimate, interval = mean_of((said == wanted).double(), moved.groups, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    dealt = torch.stack([wanted[torch.randperm(len(wanted), generator=generator)] for _ in range(_DRAWS)])
    drawn = (said == dealt).double().mean(1)
    null = range_of(drawn, f"{_DRAWS} deals of the other answers over the prompts")
    claim = f"rerouted at the {level} level, the model gives the prompt's own other answer, not just another one"
    found = Finding(f"{level}.right", claim, estimate, interval, null, len(said))
    return found.judged("above", margin=MARGIN, no_effect=float(drawn.mean()))


def logits_with(
    model: HookedModel, contrast: Contrast, positions: Int[Tensor, "n slot"], ids: Int[Tensor, "n slot"]
) -> Float[Tensor, "n d_vocab"]:
    """Last-token logits with other tokens at the free positions."""
    return observe(model, replaced(model.tokens(contrast), positions, ids), [], LAST).logits


def _beside(name: str, claim: str, shown: Tensor, control: Tensor, of: str, moved: Contrast, seed: int) -> Finding:
    """A rate beside the same rate of a control on the same prompts, with the control's own interval as the null."""
    estimate, interval = mean_of(shown.double(), moved.groups, seed=seed)
    rate, null = mean_of(control.double(), moved.groups, seed=seed)
    found = Finding(name, claim, estimate, interval, replace(null, of=of), len(shown))
    return found.judged("above", margin=MARGIN, no_effect=rate)


def summary(model: str, findings: Sequence[Finding], tables: Mapping[str, Table]) -> list[str]:
    """The answer in a few sentences, each from the findings and tables it names."""
    by_name = {finding.name: finding for finding in findings}

    def rate(name: str) -> str:
        found = by_name.get(name)
        if found is None or found.estimate != found.estimate:
            return "not tested"
        ends = f" [{found.interval.low:.2f}, {found.interval.high:.2f}]" if found.interval else ""
        return f"{found.estimate:.2f}{ends}"

    layers = tables["probes"].records()
    read = [row for row in layers if row["eligible"]]
    lines = [f"Probes read the class with an accuracy of at least {LEAST:g} at {len(read)} of {len(layers)} layers."]
    if not read:
        return [*lines, f"So no layer may be a target, and rerouting {model} was not tried."]
    at, cosine = read[0]["site"], read[0]["cosine"]
    lines.append(f"At {at}, the first of them, probe and mean difference have a cosine of {cosine:.2f}.")
    lines += [f"{model} at {row['site']} is {row['verdict']}: {row['reason']}." for row in tables["verdicts"].records()]
    ahead = [found for found in findings if found.name.startswith("search.ahead_of_answer")]
    if ahead:
        told = [f"{f.note} within {f.name.rsplit('.', 1)[1].replace('_', ' ')} ({f.verdict})" for f in ahead]
        lines.append(f"Prompts flipped by a search for the target and by one for the answer: {'; '.join(told)}.")
    if "repair.clean_accuracy" in by_name:
        lines.append(
            f"After repair the found tokens flip {rate('repair.found_tokens')} of the prompts, clean accuracy is "
            f"{rate('repair.clean_accuracy')}, a new search flips {rate('repair.search')} of the prompts, and any "
            f"choice of tokens at all {rate('repair.every_choice')}."
        )
    elif "repair.found_tokens" in by_name:
        lines.append(f"There was nothing to repair: {by_name['repair.found_tokens'].note}.")
    return lines
