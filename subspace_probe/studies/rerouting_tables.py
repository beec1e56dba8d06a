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
from subspace_probe.diagnostics.rungs import observe
from subspace_probe.diagnostics.search_comparison import RANDOM, TARGET, Searches
from subspace_probe.diagnostics.similarity import state_covariance
from subspace_probe.finders.linear_probe import LinearProbe
from subspace_probe.finders.mean_difference import MeanDifference
from subspace_probe.interventions.conditions import condition_logits
from subspace_probe.interventions.objectives import replaced
from subspace_probe.interventions.reroute import Reroute
from subspace_probe.interventions.targets import HalfSpace
from subspace_probe.linalg.angles import cosine
from subspace_probe.linalg.bases import random_directions
from subspace_probe.linalg.nulls import cosine_null
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.rerouting_prompts import Ground

READ = Expectation(above=LEAST)
HIDDEN = Expectation(below=LEAST)
NEVER = Expectation(below=0.0)
ALWAYS = Expectation(above=0.95)
_DRAWS = 200


def read_layers(
    model: HookedModel, ground: Ground, seed: int
) -> tuple[Activations, list[dict[str, Any]], list[Finding]]:
    """How well the class is read at every layer, by a probe and by the mean difference, and how alike the two are.

    Returns:
        Training activations, a row and a finding a layer.
    """
    sites = [Site(layer) for layer in range(model.spec.n_layers)]
    acts, held = (model.capture(part, sites=resid_post(), where=LAST) for part in (ground.train, ground.clean))
    rows: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for site in sites:
        mean, probe = MeanDifference(null_draws=0).fit(acts, site), LinearProbe(null_draws=0).fit(acts, site)
        covariance = state_covariance(acts, site)
        chance = range_of(cosine_null(covariance, covariance_b=covariance, n=1000, seed=seed), "random directions")
        accuracy = probe.notes["cv_accuracy"]
        found = _read(acts, held, site, mean.vector, seed)
        known = {} if ground.truth is None else ground.truth.behaviour.get("class read at the read-out token", {})
        if (certified := known.get(f"layer {site.layer}")) is not None:
            found = replace(found, expected=READ if certified >= LEAST else HIDDEN)
        findings.append(found)
        rows.append({
            "site": site.short, "layer": site.layer, "cv_accuracy": accuracy, "held_out_accuracy": found.estimate,
            "eligible": accuracy is not None and accuracy >= LEAST,
            "cosine": cosine(mean.vector.double(), probe.vector.double()), "cosine_low": chance.low,
            "cosine_high": chance.high,
        })  # fmt: skip
    return acts, rows, findings


def _read(acts: Activations, held: Activations, site: Site, vector: Float[Tensor, " d"], seed: int) -> Finding:
    """Held-out accuracy of the midpoint along a direction, beside that of random directions set up in the same way."""
    fitted, states = acts.at(site).double(), held.at(site).double()
    drawn = random_directions(_DRAWS, len(vector), seed=seed).double()
    directions = torch.cat([vector[None].double(), drawn])
    high, low = (fitted[acts.labels == label].mean(0) for label in (1, 0))
    sign = (directions @ (high - low)).sign()
    says = ((states - (high + low) / 2) @ directions.T) * sign > 0
    right = (says == (held.labels == 1)[:, None]).double()
    estimate, interval = mean_of(right[:, 0], held.groups, seed=seed)
    null = range_of(right[:, 1:].mean(0), f"{_DRAWS} random directions")
    claim = f"a mean difference reads the class at {site.short}, on held-out prompts"
    found = Finding(f"read.L{site.layer}", claim, estimate, interval, null, len(right))
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
        edited, control = condition_logits(model, moved.prompts, [Reroute(target), Reroute(target).wrong_way()])
        ours, theirs = (_put(searches, name) for name in (TARGET, RANDOM))
        for level, own, other, of in (
            ("activation", edited, control, "the wrong way"),
            ("token", ours, theirs, "tokens of the random search"),
        ):
            claim = f"rerouted at the {level} level, the model gives the prompt's other answer, not just another one"
            right, null = (logits.argmax(1) == wanted for logits in (own, other))
            found.append(_beside(f"{level}.right", claim, right, null, of, moved, seed))
    if ground.suffixes is None or not ground.suffixes.planted:
        return found
    planted = torch.tensor(ground.suffixes.planted)
    same, other = ((searches.found[name].ids == planted).all(1) for name in (TARGET, RANDOM))
    hit = _beside("token.planted", "the search finds the planted tokens", same, other, "random search", moved, seed)
    sure = ground.suffixes.planted_flips == 1.0
    return [*(replace(f, expected=ALWAYS) if f.name == "token.right" and sure else f for f in found),
            replace(hit, expected=ALWAYS)]  # fmt: skip


def _put(searches: Searches, name: str) -> Float[Tensor, "n d_vocab"]:
    """Logits with what a search found."""
    return logits_with(searches.model, searches.contrast, searches.found[name].positions, searches.found[name].ids)


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
    return found.judged("above", margin=0.1, no_effect=rate)


def summary(model: str, findings: Sequence[Finding], tables: Mapping[str, Table]) -> list[str]:
    """The answer in a few sentences, each from the findings and tables it names."""
    by_name = {finding.name: finding for finding in findings}

    def rate(name: str) -> str:
        found = by_name.get(name)
        if found is None or found.estimate != found.estimate:
            return "not tested"
        return f"{found.estimate:.2f}" + (
            f" [{found.interval.low:.2f}, {found.interval.high:.2f}]" if found.interval else ""
        )

    layers = tables["layers"].records()
    read = [row for row in layers if row["eligible"]]
    lines = [
        f"The class is read with a cross-validated accuracy of at least {LEAST:g} at {len(read)} of {len(layers)} layers"
        + (f", first at {read[0]['site']}, where probe and mean difference have a cosine of {read[0]['cosine']:.2f}." if read
           else f": nothing may be a target, and rerouting {model} was not tried.")
    ]  # fmt: skip
    for row in tables["verdicts"].records() if "verdicts" in tables else ():
        lines.append(f"{model} at {row['site']} is {row['verdict']}: {row['reason']}.")
    if "curve" in tables:
        ahead = [f for f in findings if f.name.startswith("search.ahead_of_answer")]
        told = "; ".join(f"{f.name.rsplit('.', 1)[1].replace('_', ' ')}: {f.note} ({f.verdict})" for f in ahead)
        lines.append(f"Prompts flipped by a search for the target against one for the answer, within {told}.")
    if "repair.found_tokens" in by_name:
        lines.append(
            f"After repair the found tokens flip {rate('repair.found_tokens')} of the prompts, clean accuracy is "
            f"{rate('repair.clean_accuracy')}, and a new search flips {rate('repair.search')}; of every choice of "
            f"tokens some flips {rate('repair.every_choice')}."
        )
    return lines
