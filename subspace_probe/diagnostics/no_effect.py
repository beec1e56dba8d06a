"""The findings of `explain_no_effect`: each a place where an effect can get lost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.findings import Finding, Interval, Verdict, judge_absence
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.reports import Table
from subspace_probe.core.sites import RESIDUAL, Site
from subspace_probe.core.tokens import LAST, PROMPT
from subspace_probe.diagnostics.elsewhere import Elsewhere
from subspace_probe.diagnostics.fluency import continuations, fluency
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.diagnostics.read_space import path_read_space, weight_read_space
from subspace_probe.diagnostics.variants import NOTHING, WORKS, Look
from subspace_probe.interventions.conditions import condition_logits, outcomes
from subspace_probe.interventions.gradients import metric_gradients
from subspace_probe.interventions.steer import Steer
from subspace_probe.linalg.bases import random_directions
from subspace_probe.metrics.behaviour import kl

SHOWN, NEW, TEXTS, LOGITS = 3, 16, 8, 32
"""Prompts whose tokens are named; new tokens, and prompts, for the texts; prompts for distributions."""
TOLERANCE = 0.5
"""How far text may go from unsteered text to the worst there is."""
GONE = 1e-6
"""Share of a state's norm below which a difference is rounding."""


def measured(look: Look) -> tuple[list[Finding], dict[str, Table]]:
    """All findings, in the order of the pass, and the tables they rest on."""
    arrivals = arrival_rows(look)
    findings = [
        effect(look), fired(look), size(look), arrives(look, arrivals), read(look), variants(look, "layers"),
        variants(look, "tokens"), strength(look), whole(look), text(look), concept(look),
    ]  # fmt: skip
    tried = [
        {"varied": kind, "to": what, "effect": value}
        for kind in ("layers", "tokens", "strength")
        for what, value in look.variants(kind).items()
    ]
    made = {
        "fired_tokens": (fired_rows(look), "tokens of the first prompts that the edits were to act on"),
        "arrivals": (arrivals, "median difference behind each block, as a share of the state's norm"),
        "tried": (tried, f"mean effect of each variant, as a share of {_unit(look)}"),
    }
    return findings, {name: Table.of(rows, about) for name, (rows, about) in made.items() if rows}


def effect(look: Look) -> Finding:
    """The effect itself, in units of a full one."""
    change = (look.case.edited - look.case.clean) / look.unit
    estimate, interval = mean_of(change, look.case.contrast.groups, seed=look.case.seed)
    if not bool(change.any()):  # which is no rate of 0
        interval = Interval(0.0, 0.0, of="no prompt changed at all")
    draws = look.random("x1")
    null = range_of(draws, f"{len(draws)} random directions of the same length") if len(draws) else None
    beside = f"; random directions of the same length: {null.low:z.1%} to {null.high:z.1%}" if null else ""
    note = f"it moves the metric by {estimate:z.1%} of {_unit(look)}{beside}"
    claim = "the intervention has an effect"
    found = Finding("no_effect.effect", claim, estimate, interval, null, len(change), note=note)
    if null is None:  # whole states have no random ones to compare with
        return replace(
            found, verdict="supported" if judge_absence(interval, margin=NOTHING) == "refuted" else "refuted"
        )
    found = found.judged("beyond", margin=NOTHING)
    tiny = found.verdict == "supported" and abs(estimate) < NOTHING
    return replace(found, verdict="inconclusive") if tiny else found


def _unit(look: Look) -> str:
    same = len(set(look.case.contrast.labels)) == 1 and look.case.natural is None
    return "twice its standard deviation" if same else "the distance between the classes"


def fired(look: Look) -> Finding:
    """Did every site's edit act, and on which tokens?"""
    shares = {site: one.prompts_moved() for site, one in look.fired.items()}
    least = min(shares.values())
    idle = [site.short for site, share in shares.items() if share == 0]
    here = look.here
    note = (
        f"at {look.site.short} it moved {int(here.moved.sum())} of the {len(here.prompt)} tokens that are "
        f"{str(look.case.intervention.where)!r}, in {shares[look.site]:z.0%} of the prompts: {_tokens(look)}"
    )
    note += f"; it is idle at {', '.join(idle)}" if idle else ""
    claim = "every edit acts, in every prompt"
    verdict: Verdict = "supported" if least == 1 else "refuted" if shares[look.site] == 0 else "inconclusive"
    return Finding("no_effect.fired", claim, least, n=here.n, verdict=verdict, note=note)


def _tokens(look: Look) -> str:
    rows = fired_rows(look)[: SHOWN * 2]
    return ", ".join(repr(row["token"]) for row in rows if row["moved"]) or "none"


def fired_rows(look: Look) -> list[dict[str, object]]:
    """The tokens of the first prompts, decoded, with how far each was moved."""
    prompts = look.case.contrast.prompts[:SHOWN]
    batch = look.case.model.tokens(prompts)
    rows: list[dict[str, object]] = []
    for site, one in look.fired.items():
        relative = one.size / one.before.norm(dim=1).clamp(min=1e-12)
        for row in (one.prompt < len(prompts)).nonzero().flatten().tolist():
            prompt, position = int(one.prompt[row]), int(one.position[row])
            column = position + batch.ids.shape[1] - int(batch.lengths[prompt])
            token = look.case.model.tokenizer.decode([int(batch.ids[prompt, column])])
            rows.append({"site": site.short, "prompt": prompt, "position": position, "token": token,
                         "moved": bool(one.moved[row]), "share of norm": float(relative[row])})  # fmt: skip
    return rows


def size(look: Look) -> Finding:
    """How far states were moved, against what the data do by themselves."""
    here, gap = look.here, look.class_gap
    spread = math.nan
    if look.direction is not None and len(here.before) > 1:
        spread = float((here.before @ look.direction).std())
    note = f"the move is {here.relative:z.1%} of the state's norm"
    if spread > 0:
        note += f", {look.step / spread:.2g} times the spread of the states along it"
    share = look.step / gap if gap > 0 else math.nan
    note += f", {share:.2g} times the distance of the classes along it" if math.isfinite(share) else ""
    estimate = share if math.isfinite(share) else here.relative
    verdict: Verdict = "supported" if estimate >= WORKS else "refuted" if estimate < NOTHING else "inconclusive"
    if here.relative > 2:
        note += "; so far outside the states the model knows, text may turn to gibberish"
    claim = "the move is as large as what the model does by itself"
    return Finding("no_effect.size", claim, estimate, n=here.n, verdict=verdict, note=note)


def arrives(look: Look, rows: Sequence[Mapping[str, object]]) -> Finding:
    """Does a difference reach the last token's final state?"""
    last, own = [float(str(row["at last token"])) for row in rows], [float(str(row["at its tokens"])) for row in rows]
    note = f"behind the last layer the last token's state differs by {last[-1]:z.1%} of its norm"
    gone = next((i for i in range(len(rows)) if max(own[i], last[i]) <= GONE), None)
    if gone is not None and bool(look.here.moved.any()):
        standing = ", ".join(sorted(site.short for site in look.case.model.standing_sites))
        by = f" (the model has standing interventions at {standing})" if standing else ""
        note += f"; nothing is left of the move at {rows[gone]['site']}, where it is overwritten{by}"
    elif last[-1] <= GONE < own[-1]:
        note += f"; its own tokens still differ by {own[-1]:z.1%}, but nothing later reads them"
    verdict: Verdict = "supported" if last[-1] > GONE else "refuted"
    claim = "the move arrives where the answer is read"
    return Finding("no_effect.arrives", claim, last[-1], n=look.here.n, verdict=verdict, note=note)


def arrival_rows(look: Look) -> list[dict[str, object]]:
    """Median difference behind each later block, as a share of the state's norm: at the edited tokens and the last."""
    case, n_layers = look.case, look.case.model.spec.n_layers
    sites = [Site(layer) for layer in range(look.site.layer, n_layers)]
    if look.site.stream in RESIDUAL and look.site not in sites:
        sites = [look.site, *sites]
    # a generated token is in no pass over the prompts: of 'all' these are the prompt's
    ways = {"at its tokens": PROMPT if case.intervention.where.anchor == "all" else case.intervention.where}
    rows: list[dict[str, object]] = [{"site": site.short} for site in sites]
    for column, where in (ways | {"at last token": LAST}).items():
        clean, edited = (
            case.model.capture(case.contrast, sites=sites, where=where, interventions=used)
            for used in ([], [case.intervention])
        )
        for row, site in zip(rows, sites, strict=True):
            before, after = clean.at(site).float(), edited.at(site).float()
            share = (after - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-12)
            row[column] = float(share.median())
    return rows


def read(look: Look) -> Finding:
    """Does the metric depend on what was moved, to first order, more than on a random move of that length?"""
    claim, here, case = "the metric depends on what was moved", look.here, look.case
    try:
        gradient = metric_gradients(
            case.model, case.contrast.prompts, look.site, case.intervention.where, case.metric
        ).float()
    except (ConfigError, DataError) as error:
        return Finding("no_effect.read", claim, math.nan, verdict="not tested", note=str(error))
    total = torch.zeros(here.n, dtype=torch.float64)
    predicted = total.index_add(0, here.prompt, (gradient * here.change).sum(1).double()) / look.unit
    estimate, interval = mean_of(predicted, case.contrast.groups, seed=case.seed)
    # the same prediction for moves of the same lengths along one random direction
    pull = (gradient * here.size[:, None]).sum(0).double() / here.n / look.unit
    drawn = random_directions(1000, len(pull), seed=case.seed, dtype=torch.float64) @ pull
    null = range_of(drawn, "1000 random directions, to first order")
    real = float((case.edited - case.clean).mean()) / look.unit
    space = path_read_space(gradient) if look.site.stream not in ("mlp_post", "z") else weight_read_space(
        case.model.backend, look.site
    )  # fmt: skip
    note = f"to first order it should move the metric by {estimate:z.1%} of {_unit(look)}; it moves it by {real:z.1%}"
    verdict: Verdict = "refuted"
    if not bool(gradient.any()):
        note += f"; nothing that is computed from {look.site.short} at these tokens reaches the metric"
    elif len(moved := here.change[here.moved]):
        visible = float(((moved @ space.basis.T).square().sum(1) / moved.square().sum(1)).mean())
        note += f"; {visible:z.0%} of the move is visible to what reads the site, of a random one "
        note += f"{space.rank / moved.shape[1]:z.0%}"
        along = torch.nn.functional.cosine_similarity(moved, here.before[here.moved]).abs().median()
        note += f"; the move lies along the state itself (cosine {along:.2f}), which a norm takes away" * (along > 0.9)
        verdict = "supported" if estimate not in null else "refuted"
    return Finding("no_effect.read", claim, estimate, interval, null, here.n, verdict, note=note)


def variants(look: Look, kind: str) -> Finding:
    """Would the same work at other layers, or at other tokens?"""
    one = {"layers": "layer", "tokens": "position"}[kind]
    claim, tried = f"at another {one} the same intervention works", look.variants(kind)
    if not tried:
        note = f"only steering and ablation at one site, without a rule, are moved to other {kind}."
        return Finding(f"no_effect.{kind}", claim, math.nan, verdict="not tested", note=note)
    own = float((look.case.edited - look.case.clean).mean()) / look.unit
    best = max(tried, key=lambda what: abs(tried[what]))
    listed = ", ".join(f"{what} {value:z.0%}" for what, value in tried.items())
    better = abs(tried[best]) >= WORKS and abs(tried[best]) >= 2 * abs(own)
    note = f"effect at other {kind}: {listed}; here {own:z.0%}"
    verdict: Verdict = "supported" if better else "refuted"
    return Finding(f"no_effect.{kind}", claim, tried[best], n=look.here.n, verdict=verdict, note=note)


def strength(look: Look) -> Finding:
    """Do larger strengths work, more than random directions of that length do?"""
    claim, tried = "a larger strength works, beyond what disturbs the model alike", look.variants("strength")
    if not isinstance(look.case.intervention, Steer) or not tried:
        note = "only steering has a strength."
        return Finding("no_effect.strength", claim, math.nan, verdict="not tested", note=note)
    own = float((look.case.edited - look.case.clean).mean()) / look.unit
    said, works = list[str](), list[str]()
    disturbed = disturbance(look, look.case.intervention)
    for what, value in tried.items():
        most = float(look.random(what).abs().max())
        if abs(value) >= WORKS and abs(value) > most and abs(value) >= 1.5 * abs(own):
            works.append(what)
        ours, theirs = disturbed[what]
        said.append(f"{what} {value:z.0%} (random up to {most:z.0%}; {ours:.2g} nats, random {theirs:.2g})")
    note = f"effect at larger strengths: {'; '.join(said)}; nats are the KL of next-token distributions, of "
    note += "the neutral prompts" if look.case.neutral is not None else "the same prompts"
    best = works[0] if works else max(tried, key=lambda what: abs(tried[what]))
    verdict: Verdict = "supported" if works else "refuted"
    return Finding("no_effect.strength", claim, tried[best], n=look.here.n, verdict=verdict, note=note)


def disturbance(look: Look, steer: Steer) -> dict[str, tuple[float, float]]:
    """Mean KL from clean next-token distributions at each larger strength, and that of a random direction, in nats."""
    case, whats = look.case, list(look.variants("strength"))
    of = case.neutral if case.neutral is not None and isinstance(steer.strength, float | int) else case.contrast
    scaled = [steer.scaled(float(what[1:])) for what in whats]
    random = [one.with_subspace(random_like(case.subspace, seed=case.seed)) for one in scaled]
    logits = condition_logits(case.model, of.prompts[:LOGITS], [None, *scaled, *random])
    moved = [max(0.0, float(kl(logits[0], one).mean())) for one in logits[1:]]
    return {what: (moved[i], moved[i + len(whats)]) for i, what in enumerate(whats)}


def whole(look: Look) -> Finding:
    """What does an exchange of the whole state do there?"""
    case, claim = look.case, "an exchange of the whole state there moves the behaviour"
    if case.natural is None:
        return Finding("no_effect.whole", claim, math.nan, verdict="not tested", note=case.no_natural)
    pairs = case.natural
    estimate, interval = pairs.share_of(look.exchanged["whole"], seed=case.seed)
    note = f"exchanging all of {pairs.site.short} at {pairs.where} moves {estimate:z.0%} of the difference"
    if "subspace" in look.exchanged:
        note += f", the subspace alone {float(pairs.shares(look.exchanged['subspace']).mean()):z.0%}"
        check = Elsewhere()
        values = outcomes(case.model, pairs.prompts.prompts, check.conditions(case), [case.metric])[0]
        note += f"; {check.read(case, values)[0].note}"
    verdict: Verdict = "inconclusive"
    if estimate >= 0.5 and interval.low > WORKS:
        verdict = "supported"
    elif judge_absence(interval, margin=0.15) == "supported":
        verdict = "refuted"
    return Finding("no_effect.whole", claim, estimate, interval, None, len(pairs), verdict, note=note)


def text(look: Look) -> Finding:
    """Is what the model writes under it still a text?"""
    claim, case = "the text under the intervention is one that the model could have written", look.case
    prompts = case.contrast.prompts[:TEXTS]
    try:
        plain, edited = (
            fluency(case.model, prompts, continuations(case.model, prompts, used, max_new_tokens=NEW))
            for used in ([], [case.intervention])
        )
    except (ConfigError, DataError) as error:
        return Finding("no_effect.text", claim, math.nan, verdict="not tested", note=str(error))
    broken = edited.exceeds(plain.limits(case.model.spec.d_vocab, TOLERANCE))
    note = (
        f"{edited.repeated:z.0%} of what it writes repeats (without: {plain.repeated:z.0%}), and the unsteered model "
        f"finds it {edited.loss:.2g} nats a token hard (its own {plain.loss:.2g})"
    )
    if broken:
        note += f"; it degenerates, with states moved by {look.here.relative:z.0%} of their norm: use less"
    return Finding("no_effect.text", claim, edited.loss, n=len(prompts), verdict="refuted" if broken else "supported",
                   note=note)  # fmt: skip


def concept(look: Look) -> Finding:
    """Does the subspace carry the concept there, or the prompt?"""
    case, claim = look.case, "what the subspace carries there is the concept, not the prompt"
    if case.natural is None or case.whole:
        note = case.whole or case.no_natural
        return Finding("no_effect.concept", claim, math.nan, verdict="not tested", note=note)
    pairs = case.natural
    explained = between(case.subspace.coords(pairs.base.double()), pairs.row_labels)
    note = f"{explained:z.0%} of its variance between prompts is the label's"
    verdict: Verdict = "inconclusive"
    if "stranger" in look.exchanged:
        moved = {
            name: float((values - pairs.clean).abs().mean()) / look.unit for name, values in look.exchanged.items()
        }
        other, same = moved["subspace"], moved["stranger"]
        note += f"; exchanged with a prompt of the other label it moves the metric by {other:z.0%} of "
        note += f"{_unit(look)}, with another of the same label by {same:z.0%}"
        if other >= WORKS:
            verdict = "supported" if same <= 0.25 * other else "refuted" if same >= 0.75 * other else "inconclusive"
        else:
            note += "; no exchange has an effect, so only the variance speaks"
    return Finding("no_effect.concept", claim, explained, n=len(pairs), verdict=verdict, note=note)


def between(coords: Float[Tensor, "n k"], labels: Tensor) -> float:
    """Share of the variance that lies between the classes (eta squared), over all coordinates together."""
    means = torch.stack([coords[labels == label].mean(0) for label in (0, 1)])[labels]
    total = float((coords - coords.mean(0)).square().sum())
    return float((means - coords.mean(0)).square().sum()) / total if total else 0.0
