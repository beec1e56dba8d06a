"""What the study on unlearning measures, and the findings and tables it makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from subspace_probe.core.findings import LEVEL, Expectation, Finding, Interval, judge_absence
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.sites import Site, resid_post
from subspace_probe.core.tokens import LAST
from subspace_probe.finders.answer_lens import answer_lens
from subspace_probe.finders.latent_spans import LatentSpans
from subspace_probe.interventions.relearning import relearn
from subspace_probe.interventions.unlearning import Unlearned
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.unlearning_answers import Answers, Measures, tokens_of
from subspace_probe.studies.unlearning_prompts import Prompts

SLACK = 0.05
"""How far above chance a forgotten topic may score."""
RETAINED = 0.03
"""What may be lost of everything else."""
OFF_SPAN = 1e-5
RELEARNED = 0.10
"""How far above a model that never knew the facts a model from which they are gone may relearn them."""


@runtime_checkable
class Settings(Protocol):
    """What these findings need of the study's settings."""

    @property
    def relearn_steps(self) -> int: ...
    @property
    def relearn_share(self) -> float: ...
    @property
    def relearn_lr(self) -> float: ...
    @property
    def relearn_draws(self) -> int: ...
    @property
    def draws(self) -> int: ...
    @property
    def seed(self) -> int: ...


_SAYS = {
    "forget": ("forget_accuracy", "the topic's answers are no longer given"),
    "ranked": ("forget_ranked", "the right answer is no longer the likeliest of the topic's"),
    "elsewhere": ("forget_elsewhere", "the forgotten facts are not given where they are asked for in another way"),
}


def arm_findings(
    answers: Answers,
    trained: Mapping[str, Sequence[Unlearned]],
    measured: Mapping[str, Sequence[Measures]],
    seed: int,
    *,
    first: str,
    known: bool,
) -> list[Finding]:
    """What is left of the topic and of the rest in each arm.

    Args:
        first: the arm in question.
        known: whether the model is an organism, of which something is expected.
    """
    data, found = answers.data, list[Finding]()
    for arm in trained:
        means = {name: torch.stack([one[name] for one in measured[arm]]).mean(0) for name in measured[arm][0]}
        asked = known and arm == first
        for measure, (name, claim) in _SAYS.items():
            part = data.elsewhere if measure == "elsewhere" else data.forget_test
            if measure not in means or part is None:
                continue
            estimate, interval = mean_of(means[measure], part.groups, seed=seed)
            bound = Expectation(below=round(answers.chance + SLACK, 4)) if asked and measure == "forget" else None
            null = None if measure == "elsewhere" else answers.guesses(seed)
            one = Finding(f"{name}.{arm}", claim, estimate, interval, null, len(means[measure]), expected=bound)
            verdict = judge_absence(interval, margin=2 * SLACK, no_effect=answers.chance)
            # less than chance is no knowledge either
            verdict = "supported" if interval.high <= answers.chance + 2 * SLACK else verdict
            found.append(replace(one, verdict=verdict, note=f"chance {answers.chance:.3f}"))
        found.append(_kept(answers, means["retain"], arm, seed, asked=asked))
        found.append(_kl(answers, means["kl"], arm, seed))
        found.append(_off_span(trained, arm, asked=asked))
    return found


def _kept(answers: Answers, after: Tensor, arm: str, seed: int, *, asked: bool) -> Finding:
    lost, around = _difference(answers.known["retain"] - after, answers.data.retain_test.groups, seed=seed)
    verdict = judge_absence(around, margin=RETAINED)
    interval = replace(around, low=-around.high + 0.0, high=-around.low + 0.0)
    near = [row for row, label in enumerate(answers.data.retain_test.labels) if label]
    note = f"of the topic's nearest relative {float(after[near].mean()):.3f} are right" if near else ""
    claim = f"accuracy on what is to be kept changes by less than {RETAINED:g}"
    bound = Expectation(above=-RETAINED) if asked else None
    name, n = f"retain_change.{arm}", len(after)
    return Finding(name, claim, -lost + 0.0, interval, None, n, verdict, bound, note=note)


def _difference(values: Tensor, groups: Sequence[int], *, seed: int) -> tuple[float, Interval]:
    """`mean_of` differences; where all are equal, others may be on either side, by as much as Wilson's rate of 0."""
    if (values != values[0]).any():
        return mean_of(values, groups, seed=seed)
    value, (_, interval) = float(values[0]), mean_of(torch.zeros_like(values), groups, seed=seed)
    return value, replace(interval, low=value - interval.high, high=value + interval.high)


def _kl(answers: Answers, after: Tensor, arm: str, seed: int) -> Finding:
    estimate, interval = mean_of(after, answers.data.retain_test.groups, seed=seed)
    claim = "next-token distributions of what is to be kept stay within 0.1 nats"
    verdict = judge_absence(interval, margin=0.1)
    return Finding(f"retain_kl.{arm}", claim, estimate, interval, None, len(after), verdict)


def _off_span(trained: Mapping[str, Sequence[Unlearned]], arm: str, *, asked: bool) -> Finding:
    shares = torch.tensor([one.off_span for one in trained[arm]])
    free = torch.tensor([one.off_span for name in ("rmu", "unconstrained") for one in trained.get(name, ())])
    interval = Interval(float(shares.min()), float(shares.max()), 1.0, f"least and greatest of {len(shares)} seeds")
    null = Interval(float(free.min()), float(free.max()), 1.0, "unconstrained arms") if len(free) else None
    return Finding(
        f"off_span.{arm}",
        "what the weights write anew stays in the span they are held to",
        float(shares.max()),
        interval,
        null,
        len(shares),
        "supported" if interval.high <= OFF_SPAN else "refuted",
        Expectation(below=OFF_SPAN) if asked else None,
        note=f"the change is {max(one.change for one in trained[arm]):.2f} times as large as the matrices",
    )


def comparison_findings(measured: Mapping[str, Sequence[Measures]], arms: Sequence[str]) -> list[Finding]:
    """The first arm less RMU, paired by seed. Nothing is expected: no benefit is an answer."""
    if len(arms) < 2:
        return []
    first, other = arms
    found: list[Finding] = []
    values = {
        arm: {name: torch.stack([one[name].mean() for one in measured[arm]]) for name in ("forget", "ranked", "retain")}
        for arm in arms
    }
    claims = {
        "forget": (f"{first} leaves less of the topic than {other}", "below"),
        "ranked": (f"{first} leaves less of the topic's answers in front than {other}", "below"),
        "retain": (f"{first} keeps more of the rest than {other}", "above"),
    }
    better = [
        bool(a["forget"] <= b["forget"] and a["retain"] >= b["retain"])
        for a, b in (
            ({k: x[i] for k, x in values[first].items()}, {k: x[i] for k, x in values[other].items()})
            for i in range(len(measured[first]))
        )
    ]
    note = f"at least as good in both, forgetting and keeping: {sum(better)} of {len(better)} seeds"
    for name, (claim, way) in claims.items():
        difference = values[first][name] - values[other][name]
        estimate, interval = _difference(difference, range(len(difference)), seed=0)
        interval = replace(interval, of=interval.of.replace("groups of prompts", "seeds, paired"))
        one = Finding(
            f"comparison.{name}", claim, estimate, interval, Interval(0.0, 0.0, of="no difference"), len(better)
        )
        one = one.judged("below" if way == "below" else "above", margin=0.02)
        found.append(replace(one, note=note))
    return found


def relearning_findings(
    answers: Answers, data: Prompts, models: Sequence[tuple[str, HookedModel]], config: Settings
) -> list[Finding]:
    """Some facts are taught again; the others are tested, beside facts that the model never knew."""
    generator = torch.Generator().manual_seed(config.seed)
    facts = sorted({*data.forget.groups})
    drawn = torch.randperm(len(facts), generator=generator)[: max(1, round(config.relearn_share * len(facts)))]
    taught = {facts[int(i)] for i in drawn}
    lessons = [p for p, group in zip(data.forget.prompts, data.forget.groups, strict=True) if group in taught]
    asked = data.forget_test.take([i for i, group in enumerate(data.forget_test.groups) if group not in taught])
    claim = "after a few facts are taught again, the others stay forgotten"
    if len({*asked.groups}) < 2:
        reason = "no facts are left to test"
        return [
            Finding(f"relearned.{arm}", claim, float("nan"), verdict="not tested", note=reason) for arm, _ in models
        ]

    def scores(model: HookedModel, exchange: Mapping[str, str]) -> Tensor:
        shown = [replace(p, answer=exchange.get(p.answer or "", p.answer)) for p in lessons]
        again = relearn(model, shown, steps=config.relearn_steps, lr=config.relearn_lr)
        wanted = [replace(p, answer=exchange.get(p.answer or "", p.answer)) for p in asked.prompts]
        return (again.logits(asked).argmax(-1) == tokens_of(model, wanted)).double()

    found: list[Finding] = []
    names = sorted({p.answer or "" for p in (*data.forget.prompts, *data.forget_test.prompts)})
    for arm, model in models:
        exchanged: list[Tensor] = []
        for _ in range(config.relearn_draws):
            shift = 1 + int(torch.randint(len(names) - 1, (1,), generator=generator))
            exchange = {name: names[(i + shift) % len(names)] for i, name in enumerate(names)}
            exchanged.append(scores(model, exchange).mean())
        estimate, interval = mean_of(scores(model, {}), asked.groups, seed=config.seed)
        of = f"{len(exchanged)} runs with facts that it never knew (answers exchanged)"
        chance = Interval(answers.chance, answers.chance, 0.0, "chance")
        null = range_of(torch.stack(exchanged), of) if exchanged else chance
        bound = null.high + RELEARNED
        verdict = "supported" if interval.high <= bound else "refuted" if interval.low > bound else "inconclusive"
        verdict = verdict if null.level >= LEVEL else "unaudited"
        note = (
            f"{estimate:.2f} comes back after {len(lessons)} prompts about {len(taught)} facts, {config.relearn_steps} "
            f"steps; gone would be at most {bound:.2f}. Above it, the topic was suppressed and not erased"
        )
        found.append(Finding(f"relearned.{arm}", claim, estimate, interval, null, len(asked), verdict, note=note))
    return found


def probe_rows(answers: Answers, before: HookedModel, after: HookedModel, config: Settings) -> list[dict[str, Any]]:
    """What a lens fitted on what is kept reads of the topic, at the last token of every layer, before and after."""
    data, rows = answers.data, list[dict[str, Any]]()
    unembedding = before.backend.unembedding().float().cpu()
    for name, model in (("before", before), ("after", after)):
        kept, asked = (model.capture(part, sites=resid_post(), where=LAST) for part in (data.retain, data.forget_test))
        told = unembedding[tokens_of(model, data.retain.prompts)]
        for site in kept.sites:
            seen = answer_lens(
                kept.at(site), told, asked.at(site), unembedding[answers.topic],
                draws=min(config.draws, 39), seed=config.seed,
            )  # fmt: skip
            right = (answers.topic[seen.read] == answers.forget).double()
            estimate, interval = mean_of(right, data.forget_test.groups, seed=config.seed)
            null = range_of((answers.topic[seen.shuffled] == answers.forget).double().mean(1), "shuffled answers")
            rows.append({
                "model": name, "layer": site.layer, "accuracy": estimate, "low": interval.low, "high": interval.high,
                "shuffled_low": null.low, "shuffled_high": null.high, "n": len(right),
            })  # fmt: skip
    return rows


def probe_findings(rows: Sequence[Mapping[str, Any]], site: Site, arm: str, chance: float) -> list[Finding]:
    """The best layer from the changed one on, after unlearning, beside the same layer before."""
    later = [row for row in rows if row["layer"] >= site.layer]
    best = max((row for row in later if row["model"] == "after"), key=lambda row: row["accuracy"])
    same = next(row for row in later if row["model"] == "before" and row["layer"] == best["layer"])
    found = Finding(
        f"probe.{arm}",
        "a linear map fitted on what is kept still reads the topic's answers from the states",
        best["accuracy"],
        Interval(best["low"], best["high"], of="facts"),
        Interval(best["shuffled_low"], best["shuffled_high"], of="39 maps fitted on shuffled answers"),
        best["n"],
        note=f"layer {best['layer']}, the best from {site.short} on; {same['accuracy']:.2f} there before",
    )
    return [found.judged("above", margin=SLACK, no_effect=chance)]


def where_known(before: Finding, findings: Sequence[Finding]) -> list[Finding]:
    """The findings; those on what is left of a topic that the model never knew are not tested."""
    if before.verdict == "supported":
        return list(findings)
    note = f"the model does not give the topic's answers to begin with ({before.estimate:.2f}): nothing to forget"
    left = ("forget_accuracy", "forget_ranked", "forget_elsewhere", "relearned", "probe")
    return [
        replace(one, verdict="not tested", expected=None, note=note)
        if one.name.split(".")[0] in left and one.name != before.name
        else one
        for one in findings
    ]


def latent_findings(spans: LatentSpans) -> list[Finding]:
    """How many of the latents that were taken for relevant stand out of permuted labels, and the angle of the spans."""
    beyond = int((spans.score[spans.top] > spans.null_95).sum())
    return [
        Finding(
            "latents.beyond_chance",
            "the relevant latents tell forget tokens from retain tokens better than the best under permuted labels",
            float(beyond),
            n=len(spans.top),
            verdict="supported" if beyond == len(spans.top) else "refuted" if not beyond else "inconclusive",
            note=f"of {len(spans.top)}; {spans.dead} of {len(spans.score)} are active too seldom and not ranked",
        )
    ]


def latent_rows(spans: LatentSpans) -> list[dict[str, Any]]:
    """The latents at both ends."""
    return [
        {"end": end, "latent": int(i), "score": float(spans.score[i]), "rate": float(spans.rate[i])}
        for end, latents in (("relevant", spans.top), ("irrelevant", spans.bottom))
        for i in latents
    ]


def arm_rows(findings: Sequence[Finding], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Findings by arm, for the figure."""
    measures = (
        "forget_accuracy",
        "forget_ranked",
        "forget_elsewhere",
        "retain_change",
        "relearned",
        "retain_kl",
        "off_span",
    )
    return [
        {
            "measure": measure,
            "arm": arm,
            "value": finding.estimate,
            "low": finding.interval.low if finding.interval else None,
            "high": finding.interval.high if finding.interval else None,
            "null_low": finding.null.low if finding.null else None,
            "null_high": finding.null.high if finding.null else None,
        }
        for measure in measures
        for arm in arms
        for finding in findings
        if finding.name == f"{measure}.{arm}"
    ]


def summary(model: str, findings: Sequence[Finding], arms: Sequence[str], site: Site, spans: LatentSpans) -> list[str]:
    """The answer in a few sentences, each from the findings it names."""
    by_name = {finding.name: finding for finding in findings}

    def figure(name: str) -> str:
        one = by_name.get(name)
        if one is None or one.verdict == "not tested":
            return "not tested"
        return f"{one.estimate:.2f}" + (f" [{one.interval.low:.2f}, {one.interval.high:.2f}]" if one.interval else "")

    first = arms[0]
    angle = float(torch.rad2deg(spans.angles[0]))
    lines = [
        f"{model} was made to forget at {site.short}. The relevant span has rank {spans.relevant.rank}, the irrelevant "
        f"one {spans.irrelevant.rank}; their smallest angle is {angle:.0f} degrees.",
        f"It gives {figure('forget_accuracy.before')} of the topic's answers before. After {first}, it gives "
        f"{figure(f'forget_accuracy.{first}')}; the right answer is the likeliest of the topic's in "
        f"{figure(f'forget_ranked.{first}')}. Accuracy on the rest changes by {figure(f'retain_change.{first}')}.",
        f"The share of the change outside the span is {by_name[f'off_span.{first}'].estimate:.1e}"
        + (f", under the soft penalty {by_name['off_span.soft'].estimate:.1e}." if "off_span.soft" in by_name else "."),
    ]
    if "comparison.forget" in by_name:
        one = by_name["comparison.forget"]
        kept = figure("comparison.retain")
        benefit = "forgets more" if one.verdict == "supported" else "shows no benefit in forgetting"
        lines.append(
            f"Against misdirection in a random direction, {first} {benefit}: the difference is "
            f"{figure('comparison.forget')} of the topic, {figure('comparison.ranked')} where only the topic's answers "
            f"count, and {kept} of the rest; {one.note}."
        )
    again = by_name[f"relearned.{first}"]
    never = f", and {again.null.high:.2f} of facts that it never knew" if again.null else ""
    lines.append(
        f"Taught a few facts again, the model gives {figure(again.name)} of the others{never} (that they stay "
        f"forgotten: {again.verdict}). What is not said is not thereby gone."
    )
    return lines
