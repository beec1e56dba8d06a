"""Findings and tables of the study on the context knob: written intents, where they sit, what a direction does."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.findings import Expectation, Finding, Interval, judge_absence
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST, Where
from subspace_probe.diagnostics.knob_controls import orthogonal_directions
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.interventions.exchange_scan import exchange_scan, exchange_within, source_rows
from subspace_probe.interventions.layer_search import PUBLISHED, search_layers
from subspace_probe.interventions.patchscope import FinalProbability
from subspace_probe.linalg.resampling import bootstrap_statistic, percentile_interval
from subspace_probe.metrics.answers import Accuracy
from subspace_probe.metrics.pairs import Pairs, memorisation_ratio
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms.truth import GroundTruth
from subspace_probe.studies.context_knob_prompts import Prompts

MARGIN = 0.1
"""Half-width of "no effect" on a rate: stated beforehand, the same everywhere."""
WORKS = 0.5
"""Share of answers that must turn for a state to count as carrying the intent."""
_SEARCHED = 24
"""Pairs in the layer search."""
_SOURCES = {False: "the same question", True: "another question"}

ABOUT: Mapping[str, str] = {
    "written": "Answers to held-out questions by how the intent is written, nothing done to the model. A pair counts "
    "where both its prompts are answered as told; the memorisation ratio is the share of answers from memory.",
    "patch_sweep": "States of one token behind one layer, exchanged with those of a prompt under the other intent: "
    "share of prompts that then answer their own question as the source's intent makes right. Whole states of the same "
    "question show where the difference passes, be it intent or answer; the component along the difference of the "
    "intents' means, from another question, only where it is still the intent.",
    "search": "Attention outputs at the last token that must come from the source for its answer to be given, found by "
    "two binary searches. CP and PC differ in the intent alone, PRIOR and CTX in the question alone.",
    "knob_layers": "Share of test prompts that answer as the source's intent makes right: whole states and the trained "
    "direction of each layer, at the last token.",
    "strength": "Pairs of validation prompts without an intent that are right both ways, by how far the constants lie "
    "from the middle of the class means, in gaps between them; the constants stand beside.",
    "nulls": "The same prompts moved as far along directions orthogonal to the knob.",
    "knob_variants": "Models on the line from the base's weights to the tuned one's: separation of the two intents "
    "along the knob and along random directions, and pair accuracy.",
    "questions": "What each check asked and found.",
    "summary": "The answer, from the findings.",
}


@runtime_checkable
class Settings(Protocol):
    """What is read of the study's settings here."""

    @property
    def draws(self) -> int: ...
    @property
    def readout(self) -> str: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Scan:
    """Whether an exchange of states turns the answer, shape [layer, position, n] or, for the control, [position, n].

    Attributes:
        positions: the last token first.
        texts: the token there, where all prompts agree on it.
        whole: the whole state, from the partner in the pair.
        along: its component along the difference of the intents' means, from a prompt of another question.
        control: the same from a prompt of another question and the same intent, which should turn nothing, at the
            layer that turns most.
    """

    contrast: Contrast
    positions: tuple[Where, ...]
    texts: tuple[str, ...]
    whole: Float64[Tensor, "layer position n"]
    along: Float64[Tensor, "layer position n"]
    control: Float64[Tensor, "position n"]

    def named(self, position: int) -> str:
        """A position in words, with its token."""
        text = self.texts[position].strip()
        place = f"token {position + 1} from the end" if position else "the last token"
        return f"{place}{f' ({text})' if text else ''}"


def truth_of(model: HookedModel) -> str:
    """Where an organism takes up the intent, by its certificate: at the "last" token or "earlier"; "" if not known."""
    if model.directory is None or not (model.directory / "truth.json").is_file():
        return ""
    behaviour = GroundTruth.load(model.directory).behaviour
    for name, truth in (("last", "last"), ("intent", "earlier")):
        turned_there = behaviour.get(f"{name} token, one direction of another question", {})
        if turned_there and max(turned_there.values()) >= WORKS:
            return truth
    return ""


# ------------------------------------------------------------------------------------------------------ written intents
@final
@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answers under one format of the intent.

    Attributes:
        right: 1 where a prompt gets its own answer, [n].
        wrong: 1 where it gets its partner's, [n].
    """

    asked: Contrast
    right: Float64[Tensor, " n"]
    wrong: Float64[Tensor, " n"]


@final
class _PartnersAnswer:
    name = "partner's answer"

    def __init__(self, model: HookedModel) -> None:
        self._accuracy = Accuracy(model)

    def __call__(self, logits: Float[Tensor, "n d_vocab"], prompts: Sequence[Prompt]) -> Float[Tensor, " n"]:
        return self._accuracy(logits, [replace(prompt, answer=prompt.foil) for prompt in prompts])


def answers(model: HookedModel, data: Prompts) -> dict[str, Answers]:
    """What a model answers on test prompts, by the format of the intent."""
    found: dict[str, Answers] = {}
    for form in data.formats:
        asked = data.under(data.test, form)
        right, wrong = outcomes(model, asked.prompts, [None], [Accuracy(model), _PartnersAnswer(model)])[:, 0]
        found[form] = Answers(asked, right, wrong)
    return found


def written_rows(name: str, answered: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """What a model answers, one row a format of the intent."""
    rows: list[dict[str, Any]] = []
    for form, found in answered.items():
        asked, right, wrong = found.asked, found.right, found.wrong
        label = torch.tensor(asked.labels, dtype=torch.bool)
        context, prior = torch.where(label, right, wrong), torch.where(label, wrong, right)
        rows.append({
            "model": name,
            "intent": form,
            "pair_accuracy": float(Pairs.of(asked).accuracy(right).mean()),
            "accuracy": float(right.mean()),
            "right_for_context": float(right[label].mean()),
            "right_for_prior": float(right[~label].mean()),
            "memorisation_ratio": memorisation_ratio(prior, context),
            "other_answers": float(1 - (context + prior).mean()),
            "n": len(asked),
        })  # fmt: skip
    return rows


def written_findings(answered: Mapping[str, Answers], truth: str, seed: int) -> list[Finding]:
    """Pair accuracy under every format; its null exchanges the intents of each pair at random."""
    findings: list[Finding] = []
    for form, each in answered.items():
        asked, right, wrong = each.asked, each.right, each.wrong
        pairs, first = Pairs.of(asked), form == next(iter(answered))
        estimate, interval = mean_of(pairs.accuracy(right), pairs.groups, seed=seed)
        null = range_of(pairs.swapped(right, wrong, draws=200, seed=seed), "200 tests with intents exchanged at random")
        note = f"accuracy {float(right.mean()):.3f}; with meaningless intents {(null.low + null.high) / 2:.2f}"
        found = Finding(f"written.{form}", "", estimate, interval, null, len(asked), note=note)
        if form == "none":
            claim = "without an intent pairs are not answered both ways"
            expected = Expectation(below=0.05) if truth else None
            verdict = judge_absence(interval, margin=MARGIN)
            findings.append(replace(found, claim=claim, verdict=verdict, expected=expected))
            continue
        claim = f"the intent in the format {form!r} decides the answers"
        expected = Expectation(above=0.97) if truth and first else None
        middle = (null.low + null.high) / 2
        found = replace(found, claim=claim, expected=expected)
        findings.append(found.judged("above", margin=MARGIN, no_effect=middle))
    return findings


# ----------------------------------------------------------------------------------------------------------------- scan
def scan_findings(scan: Scan, truth: str, seed: int) -> list[Finding]:
    """At which token one direction carries the intent, and what it does at the last token and before it."""
    rates, groups = scan.along.mean(-1), scan.contrast.groups
    findings: list[Finding] = []
    for name, columns in (("last", [0]), ("before", list(range(1, len(scan.positions))))):
        if not columns:
            continue
        layer, column = divmod(int(rates[:, columns].argmax()), len(columns))
        position = columns[column]
        estimate, interval = mean_of(scan.along[layer, position], groups, seed=seed)
        null = replace(mean_of(scan.control[position], groups, seed=seed)[1], of="sources of the same intent")
        good = (name == "last") == (truth == "last")
        expected = (Expectation(above=WORKS) if good else Expectation(below=0.05)) if truth else None
        place = "the last token" if name == "last" else "a token before the last one"
        claim = f"at {place} the difference of the intents' means, from another question, turns the answer"
        note = f"most behind layer {layer} at {scan.named(position)}"
        found = Finding(
            f"scan.{name}", claim, estimate, interval, null, len(scan.contrast), expected=expected, note=note
        )
        findings.append(found.judged("above", margin=MARGIN))
    return [_pointed(scan, truth, seed), *findings]


def _pointed(scan: Scan, truth: str, seed: int) -> Finding:
    """The position that the scan points to, counted from the end, with the range over resampled prompts."""

    def best(rows: Tensor) -> float:
        return 1.0 + int(scan.along[..., rows].mean(-1).amax(0).argmax())

    n, groups = len(scan.contrast), torch.tensor(scan.contrast.groups)
    estimate = best(torch.arange(n))
    drawn = bootstrap_statistic(best, n, clusters=groups, draws=200, seed=seed)
    interval = Interval(*percentile_interval(drawn, 0.95), of="groups of prompts, bootstrap")
    count = len(scan.positions)
    null = Interval(1.0, float(count), of="all positions scanned")
    at = {"last": 1.0, "earlier": 2.0}.get(truth)
    expected = None if at is None else Expectation(above=at, below=at)
    claim = "of all tokens, counted from the end, this one carries the intent along one direction"
    verdict = "supported" if interval.low == interval.high else "inconclusive"
    note = f"{scan.named(int(estimate) - 1)}; the same in all resamples" if verdict == "supported" else "not certain"
    return Finding("scan.position", claim, estimate, interval, null, n, verdict, expected, note=note)


def scan_rows(scan: Scan) -> list[dict[str, Any]]:
    """The scan as the heat map reads it: a panel for each kind of exchange."""
    count = len(scan.positions)
    return [
        {"stream": name, "layer": layer, "position": str(scan.positions[p]), "order": count - 1 - p,
         "token": scan.texts[p], "head": None, "patched": rate, "effect": rate}
        for name, values in (("whole state, same question", scan.whole), ("direction, another question", scan.along))
        for layer, line in enumerate(values.mean(-1).tolist())
        for p, rate in enumerate(line)
    ]  # fmt: skip


def search_rows(model: HookedModel, contrast: Contrast, config: Settings) -> list[dict[str, Any]]:
    """The four searches over attention outputs.

    Raises:
        ConfigError: an unknown read-out.
    """
    if config.readout not in ("final", "identity"):
        raise ConfigError(f"readout={config.readout!r} was given. Use 'final' or 'identity'.")
    readout = PUBLISHED if config.readout == "identity" else FinalProbability()
    context, prior = contrast.first_pairs(_SEARCHED).sides()
    # sides() gives both the same question; here each keeps its own answer
    own = {1: context.prompts, 0: tuple(replace(p, answer=p.foil, foil=p.answer) for p in prior.prompts)}
    shifted = {label: (*prompts[1:], prompts[0]) for label, prompts in own.items()}
    rows: list[dict[str, Any]] = []
    for name, sources, targets in (
        ("CP", own[1], own[0]), ("PC", own[0], own[1]), ("PRIOR", shifted[0], own[0]), ("CTX", shifted[1], own[1]),
    ):  # fmt: skip
        kept = [(s, t) for s, t in zip(sources, targets, strict=True) if s.answer != t.answer]
        row: dict[str, Any] = {
            "setting": name,
            "layers": "",
            "reached": False,
            "source": None,
            "target": None,
            "runs": 0,
        }
        try:
            found = search_layers(model, [s for s, _ in kept], [t for _, t in kept], readout=readout, scan_up_to=0)
        except DataError as error:  # answers that begin with the same token
            rows.append({**row, "layers": str(error)})
            continue
        layers = ", ".join(map(str, found.layers)) if found.reached else "threshold not reached"
        ends = {"source": float(found.source[-1]), "target": float(found.target[-1])}
        rows.append({**row, "layers": layers, "reached": found.reached, **ends, "runs": found.runs})
    return rows


# ------------------------------------------------------------------------------------------------------------ direction
def exchange_findings(
    model: HookedModel, contrast: Contrast, best: Subspace, last: Subspace, truth: str, config: Settings
) -> list[Finding]:
    """Interchange of the chosen direction, and of the one behind the last layer, where the answer is written."""
    findings: list[Finding] = []
    for name, direction in (("knob", best), ("last_layer", last)):
        for another, of in _SOURCES.items():
            drawn = orthogonal_directions(direction, config.draws, seed=config.seed)
            sources = source_rows(contrast, another=another, seed=config.seed)
            values = exchange_within(model, contrast, sources, [direction, *drawn])
            estimate, interval = mean_of(values[0], contrast.groups, seed=config.seed)
            null = range_of(values[1:].mean(1), f"{len(drawn)} directions orthogonal to it")
            short = "another_question" if another else "same_question"
            found = Finding(f"interchange.{name}.{short}", "", estimate, interval, null, len(contrast))
            place = direction.site.short if direction.site else ""
            if name == "last_layer":
                claim = f"behind the last layer no direction turns the answer, with sources of {of}"
                found = replace(found, claim=claim, verdict=judge_absence(interval, margin=MARGIN))
                expected = Expectation(below=0.10) if truth else None
            else:
                found = replace(found, claim=f"one direction turns the answer, with sources of {of}")
                found = found.judged("above", margin=MARGIN)
                high, low = Expectation(above=0.95), Expectation(below=0.05)
                expected = {"last": high, "earlier": low if another else None}.get(truth)
            findings.append(replace(found, expected=expected, note=f"at {place}"))
    return findings


def layer_rows(
    model: HookedModel, contrast: Contrast, found: Mapping[int, Subspace], best: Subspace, seed: int
) -> list[dict[str, Any]]:
    """Whole states and directions by layer, at the last token, on test prompts."""
    rows: list[dict[str, Any]] = []
    for another in _SOURCES:
        sources = source_rows(contrast, another=another, seed=seed)
        whole = exchange_scan(model, contrast, sources, [LAST], layers=list(found))[:, 0]
        rates = exchange_within(model, contrast, sources, list(found.values()))
        lines = [("whole state", layer, line, False) for layer, line in zip(found, whole, strict=True)]
        lines += [
            ("direction", layer, line, direction is best)
            for (layer, direction), line in zip(found.items(), rates, strict=True)
        ]
        for what, layer, line, chosen in lines:
            rate, spread = mean_of(line, contrast.groups, seed=seed)
            ends = {"low": spread.low, "high": spread.high}
            rows.append({"source": _SOURCES[another], "what": what, "layer": layer, "rate": rate, **ends,
                         "chosen": chosen})  # fmt: skip
    return rows


def _transferred(
    findings: Mapping[str, Finding], figure: Callable[[str], str], above: Callable[[str], str]
) -> list[str]:
    """On the untuned model and between the two; nothing where there is none."""
    if math.isnan(findings["base.clamped"].estimate):
        return ["No untuned model was given, so neither transfer nor the correlation over models was tried."]
    lines = [
        f"In the untuned model the same constants give {figure('base.clamped')}{above('base.clamped')}, against the "
        f"written intent a gain of {figure('base.gain')}."
    ]
    if not math.isnan(findings["correlation.knob"].estimate):
        lines.append(
            "Over models between the two the rank correlation of the separation along the knob with pair accuracy is "
            f"{figure('correlation.knob')} ({findings['correlation.knob'].note}). In every one of them the intents lie "
            f"at least {findings['correlation.excess'].estimate:.0f} times farther apart along the knob than along a "
            "typical direction."
        )
    return lines


def summary(model: str, best: Subspace, strength: float, findings: Sequence[Finding]) -> list[str]:
    """The answer in a few sentences, each from the findings it names."""
    by_name = {finding.name: finding for finding in findings}

    def figure(name: str) -> str:
        found = by_name.get(name)
        if found is None or math.isnan(found.estimate):
            return "not tested"
        interval = f" [{found.interval.low:.2f}, {found.interval.high:.2f}]" if found.interval else ""
        return f"{found.estimate:.2f}{interval}"

    def above(name: str) -> str:
        null = by_name[name].null if name in by_name else None
        return "" if null is None else f" (orthogonal directions {null.low:.2f} to {null.high:.2f})"

    def said(name: str) -> str:
        return by_name[name].note if name in by_name else "not tested"

    where = max((f for f in findings if f.name in ("scan.last", "scan.before")), key=lambda f: f.estimate)
    site = best.site.short if best.site else ""
    return [
        f"{model} answers {figure('written.instruction')} of held-out pairs as told by the written intent, and "
        f"{figure('written.none')} without one.",
        f"The scan points to {said('scan.position')}: {where.note}, the difference of the intents' means turns "
        f"{figure(where.name)} of the answers to other questions; at the last token at best {figure('scan.last')}.",
        f"One direction at {site} turns {figure('interchange.knob.another_question')} of the answers"
        f"{above('interchange.knob.another_question')}; behind the last layer one turns "
        f"{figure('interchange.last_layer.another_question')}.",
        f"Clamped to constants at {strength:g} gaps from the middle, without a written intent, it gives a pair "
        f"accuracy of {figure('tuned.clamped')}{above('tuned.clamped')}.",
        *_transferred(by_name, figure, above),
        f"Specificity, on prompts that the intent must not touch: set to prior, {said('specificity.prior')}; set to "
        f"context, {said('specificity.context')}.",
        "An answer is read off the first token of the reply.",
    ]
