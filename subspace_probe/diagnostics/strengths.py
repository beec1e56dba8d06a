"""What steering does at rising strengths, until the text breaks; beside random directions and the request in words."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.prompts import Prompt, asking
from subspace_probe.core.protocols import Metric
from subspace_probe.core.reports import Provenance, Report, Table, number
from subspace_probe.diagnostics.auditing import audit
from subspace_probe.diagnostics.fluency import Fluency, continuations, fluency
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.interventions.steer import Steer
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.metrics.answers import LogitDifference
from subspace_probe.models.hooked import HookedModel

Row = tuple[object, ...]


def strength_sweep(
    model: HookedModel,
    steer: Steer,
    contrast: Contrast,
    metric: str | Metric | None,
    strengths: Sequence[float],
    *,
    draws: int = 40,
    words: Contrast | str | None = None,
    show: int = 4,
    max_new_tokens: int = 32,
    tolerance: float = 0.5,
    stop: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Steer at rising strengths, from 0 on, and say what changes: a behaviour, and the text.

    Either sign is followed on its own, from the smallest strength to the largest. Where the text degenerates, larger
    ones of that sign are not run: a behaviour that is measured in broken text is no longer that behaviour. Text has
    degenerated where, on average over the prompts shown, its share of repeated 3-grams or its loss under the unsteered
    model is more than `tolerance` of the way from that of unsteered text to the worst there is: everything repeated,
    or tokens drawn at random. Half of the way lies far from both: from what a change of behaviour costs, a few
    surprising words, and from what every broken text reaches. See `Fluency.limits`.

    Args:
        steer: direction, site, tokens, unit and rule; its own strength is not used.
        contrast: the prompts.
        metric: a name from `METRICS`, or a callable; None to look at texts only.
        strengths: in the unit of `steer`; 0, the unsteered model, is always run.
        draws: random directions, as long as the steered one at each strength, behind the verdict.
        words: the request made in words, the baseline of steering: an instruction that is put in front of every prompt
            (or around it: "{x}, in one word"), or the reworded prompts themselves, in their order.
        show: complete so many of the prompts; 0 to look at the metric only, and not to stop.
        max_new_tokens: length of the completions. A text of less than 3 tokens has nothing to repeat.
        tolerance: how far text may go, 0 to 1.
        stop: False runs every strength, and only marks those at which text degenerates.
        seed: of the draws and of the bootstrap.

    Returns:
        A report with a finding `<metric>.<strength>` for each strength that was run, `<metric>.words`, and the tables
        `doses` (means, and the share of prompts moved against the mean), `effects` (one row a prompt and strength),
        `strength` (for the figure), `nulls`, `completions`, `text` (both measures at each strength, and whether it
        degenerated) and `summary`.

    Raises:
        ConfigError: no strength but 0, one that is not finite, or a tolerance outside (0, 1).
        DataError: reworded prompts that are not as many as the prompts.
    """
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance={tolerance} was given. It lies between 0 and 1.")
    doses = [steer.with_strength(strength) for strength in _rising(strengths)]
    asked = None if words is None else _in_words(contrast, words)
    shown = contrast.prompts[:show]
    texts = _Texts(model, shown, max_new_tokens, tolerance, progress)
    ran, tables = _written(texts, doses, asked, stop=stop, seed=seed) if shown else (doses, {})
    notes = _stopped(tables["text"], doses, ran) if shown else []
    report = Report("steer")
    if metric is not None:
        sweep = _Sweep(model, ran, contrast, metric_for(metric, model), name_of(metric), draws, asked, seed, progress)
        report = sweep.report()
        notes = [*(finding.note for finding in report.findings if finding.note), *notes]
        report += _integrity(sweep)
    config = {
        "steering": repr(steer.with_strength(1.0)),
        "unit": steer.unit,
        "strengths": [dose.strength for dose in doses],
        "metric": None if metric is None else name_of(metric),
        "random": draws,
        "words": words if isinstance(words, str) else words and words.name,
        "show": show,
        "max_new_tokens": max_new_tokens,
        "tolerance": tolerance,
        "stop": stop,
    }
    source = Provenance.now(
        model=model.spec.name, fingerprint=model.fingerprint, data=contrast.name, config=config, seed=seed
    )
    summary = {"summary": Table(("sentence",), tuple((note,) for note in notes))} if notes else {}
    return replace(report, tables={**summary, **report.tables, **tables}, provenance=source)


def _rising(strengths: Sequence[float]) -> list[float]:
    """Each strength once, without 0, from the smallest to the largest, whatever its sign."""
    if not all(map(math.isfinite, strengths)):
        raise ConfigError(f"Strengths {list(strengths)} were given. They must be finite numbers.")
    found = sorted({float(strength) for strength in strengths if strength}, key=lambda s: (abs(s), s))
    if not found:
        raise ConfigError("No strength but 0 was given, which is the unsteered model. Give for instance 0.5, 1 and 2.")
    return found


def _in_words(contrast: Contrast, words: Contrast | str) -> Contrast:
    """The prompts with the request made in words; what is expected of each stays."""
    if isinstance(words, Contrast):
        if len(words) != len(contrast):
            raise DataError(
                f"{len(words)} reworded prompts were given for {len(contrast)} prompts. Give one for each, in order."
            )
        return words
    template = words if "{x}" in words else f"{words} {{x}}"

    def reworded(prompt: Prompt) -> Prompt:
        return replace(asking(prompt, template), answer=prompt.answer, foil=prompt.foil)

    return contrast.map(reworded)


@final
@dataclass(frozen=True)
class _Texts:
    """What the model writes after some prompts."""

    model: HookedModel
    prompts: Sequence[Prompt]
    new: int
    tolerance: float
    progress: bool

    def of(self, steer: Steer | None, prompts: Sequence[Prompt] | None = None) -> tuple[list[str], Fluency]:
        """The texts, and how they read to the unsteered model after the prompts it was given."""
        shown = self.prompts if prompts is None else prompts
        ids = continuations(self.model, shown, [steer] if steer else [], max_new_tokens=self.new)
        decode: Callable[..., str] = self.model.tokenizer.decode
        return [decode(row, skip_special_tokens=True).strip() for row in ids], fluency(self.model, shown, ids)

    def limits(self, unsteered: Fluency) -> Fluency:
        """How far texts may go."""
        return unsteered.limits(self.model.spec.d_vocab, self.tolerance)


def _written(
    texts: _Texts, doses: Sequence[Steer], words: Contrast | None, *, stop: bool, seed: int
) -> tuple[list[Steer], dict[str, Table]]:
    """The strengths that were run, what was written at them, and how it reads."""
    clean, own = texts.of(None)
    limits = texts.limits(own)
    said: list[tuple[str, list[str]]] = [("unsteered", clean)]
    rows: list[Row] = [(0.0, own.repeated, own.loss, limits.repeated, limits.loss, False)]
    ran, broken = list[Steer](), set[bool]()
    bar: Callable[..., tqdm] = tqdm
    for dose in bar(doses, desc="generate", disable=not texts.progress, leave=False):
        sign = dose.strengths[0] > 0
        if stop and sign in broken:
            continue
        written, found = texts.of(dose)
        ran.append(dose)
        said.append((f"strength {dose.strength:+g}", written))
        degenerate = found.exceeds(limits)
        broken |= {sign} if degenerate else set()
        rows.append((dose.strength, found.repeated, found.loss, limits.repeated, limits.loss, degenerate))
    strongest = max(ran, key=lambda dose: dose.size)
    said.append((f"random {strongest.strength:+g}", texts.of(_random(strongest, seed))[0]))
    if words is not None:
        said.append(("in words", texts.of(None, words.prompts[: len(texts.prompts)])[0]))
    columns = ("strength", "repeated", "loss", "repeated_limit", "loss_limit", "degenerate")
    about = "share of repeated 3-grams, and nats a token under the unsteered model, against their limits"
    told = [(p.shown, name, text) for name, all_of in said for p, text in zip(texts.prompts, all_of, strict=True)]
    completions = "greedy continuations; the random direction has the norm of the strongest steering"
    return ran, {
        "completions": Table(("prompt", "condition", "text"), tuple(told), completions),
        "text": Table(columns, tuple(rows), about),
    }


def _stopped(text: Table, doses: Sequence[Steer], ran: Sequence[Steer]) -> list[str]:
    """Where the text degenerates, by how much, and what was not run for it."""
    told: list[str] = []
    for row in text.where(degenerate=True).records():
        left = [f"{dose.strength:+g}" for dose in doses if dose not in ran and dose.strengths[0] * row["strength"] > 0]
        told.append(
            f"At {row['strength']:+g} the text degenerates: {row['repeated']:.0%} of its 3-grams repeat (limit "
            f"{row['repeated_limit']:.0%}), and it costs the unsteered model {number(row['loss'])} nats a token "
            f"(limit {number(row['loss_limit'])})." + (f" Not run: {', '.join(left)}." if left else "")
        )
    return told


def _random(dose: Steer, seed: int) -> Steer:
    return dose.with_subspace(random_like(dose.subspace, seed=seed))


@final
@dataclass(frozen=True, eq=False)
class _Sweep:
    """A behaviour at each strength."""

    model: HookedModel
    doses: Sequence[Steer]
    contrast: Contrast
    metric: Metric
    name: str
    draws: int
    words: Contrast | None
    seed: int
    progress: bool

    def report(self) -> Report:
        """Findings and tables of the behaviour."""
        behaviour, shown = _called(self.model, self.metric, self.name, self.contrast)
        randoms = [_random(dose, self.seed + draw) for dose in self.doses for draw in range(self.draws)]
        values = self._values(self.contrast, [None, *self.doses, *randoms])
        clean, steered = values[0], values[1 : 1 + len(self.doses)]
        drawn = values[1 + len(self.doses) :].reshape(len(self.doses), self.draws, len(self.contrast))
        margin = 0.1 * float(clean.std()) if len(clean) > 1 else 0.0
        findings = [
            self._finding(dose, behaviour, clean, own, null, margin=margin)
            for dose, own, null in zip(self.doses, steered, drawn, strict=True)
        ]
        asked = None if self.words is None else self._values(self.words, [None])[0]
        if asked is not None:
            findings.append(self._baseline(behaviour, clean, asked))
        tables = {
            "doses": self._doses(behaviour, clean, steered),
            "strength": self._rates(shown, clean, steered, drawn, asked),
            "nulls": self._nulls(behaviour, clean, steered, drawn),
            "effects": self._effects(behaviour, clean, steered),
        }
        return Report("steer", tuple(findings), tables)

    def _values(self, contrast: Contrast, planned: Sequence[Steer | None]) -> Float[Tensor, "condition n"]:
        return outcomes(self.model, contrast.prompts, planned, [self.metric], progress=self.progress, name=self.name)[0]

    def _mean(self, values: Tensor) -> tuple[float, Interval]:
        return mean_of(values, self.contrast.groups, seed=self.seed)

    def _finding(
        self, dose: Steer, behaviour: str, clean: Tensor, own: Tensor, drawn: Tensor, *, margin: float
    ) -> Finding:
        change = own - clean
        estimate, interval = self._mean(change)
        null = None
        if self.draws:
            null = range_of((drawn - clean).mean(1), f"{self.draws} random directions of equal norm")
        name = f"{self.name}.{dose.strength:+g}"
        claim = f"steering at {dose.strength:+g} changes the {behaviour} beyond random directions of equal norm"
        found = Finding(name, claim, estimate, interval, null, len(own)).judged("beyond", margin=margin)
        before, after = number(float(clean.mean())), number(float(own.mean()))
        note = f"At {dose.strength:+g} the {behaviour} goes from {before} to {after}"
        note += f" ({float(_against(change).mean()):.0%} of prompts the other way)" if len(own) > 1 else ""
        if null:
            note += f"; {null.of} change it by {number(null.low)} to {number(null.high)}"
        note += "." if len(own) > 1 else "; one prompt gives no interval, so no verdict: add prompts."
        return replace(found, note=note)

    def _baseline(self, behaviour: str, clean: Tensor, asked: Tensor) -> Finding:
        """The request made in words; no verdict, because random words are no control."""
        estimate, interval = self._mean(asked - clean)
        note = (
            f"Asked in words, the {behaviour} goes from {number(float(clean.mean()))} to {number(float(asked.mean()))}."
        )
        claim = f"the same request made in words changes the {behaviour}"
        return Finding(f"{self.name}.words", claim, estimate, interval, n=len(clean), note=note)

    def _doses(self, behaviour: str, clean: Tensor, steered: Tensor) -> Table:
        rows: list[Row] = []
        for dose, own in zip(self.doses, steered, strict=True):
            share, interval = self._mean(_against(own - clean))
            means = float(clean.mean()), float(own.mean())
            rows.append((dose.strength, *means, share, interval.low, interval.high))
        columns = ("strength", "unsteered", "steered", "wrong_way", "wrong_way_low", "wrong_way_high")
        about = f"mean {behaviour} at each strength, and the share of prompts moved against the mean"
        return Table(columns, tuple(rows), about)

    def _effects(self, behaviour: str, clean: Tensor, steered: Tensor) -> Table:
        rows = [
            (prompt.shown, label, dose.strength, before, after)
            for dose, own in zip(self.doses, steered, strict=True)
            for prompt, label, before, after in zip(
                self.contrast.prompts, self.contrast.labels, clean.tolist(), own.tolist(), strict=True
            )
        ]
        columns = ("prompt", "label", "strength", "unsteered", "steered")
        return Table(columns, tuple(rows), f"{behaviour} of each prompt at each strength")

    def _rates(self, behaviour: str, clean: Tensor, steered: Tensor, drawn: Tensor, asked: Tensor | None) -> Table:
        """Share of prompts that show the behaviour, by strength; 0 is the unsteered model for all."""
        rows: list[tuple[str, str, float, float, float, float]] = []
        at = [0.0, *(dose.strengths[0] for dose in self.doses)]
        nulls = [clean.expand(max(1, self.draws), -1), *drawn]
        for strength, values, null in zip(at, [clean, *steered], nulls, strict=True):
            curves = {"found": values > 0}
            if strength:
                curves["moved the wrong way"] = _against(values - clean) > 0
            if asked is not None:
                curves["in words"] = asked > 0
            for direction, shown in curves.items():
                rate, interval = self._mean(shown.double())
                rows.append((direction, behaviour, strength, rate, interval.low, interval.high))
            if self.draws:
                rates = (null > 0).double().mean(1)
                spread = range_of(rates, "random directions")
                rows.append(("random", behaviour, strength, float(rates.mean()), spread.low, spread.high))
        rows.sort(key=lambda row: row[2])
        columns = ("direction", "behaviour", "strength", "rate", "low", "high")
        about = "share of prompts that show the behaviour, and of those moved against the mean, at each strength"
        return Table(columns, tuple(rows), about)

    def _nulls(self, behaviour: str, clean: Tensor, steered: Tensor, drawn: Tensor) -> Table:
        """The mean change along every random direction, and the observed one, by strength."""
        rows: list[tuple[str, str, str, float]] = []
        for dose, own, null in zip(self.doses, steered, drawn, strict=True):
            name = f"strength {dose.strength:+g}"
            rows += [(name, behaviour, "random direction", value) for value in (null - clean).mean(1).tolist()]
            rows.append((name, behaviour, "observed", float((own - clean).mean())))
        return Table(("direction", "behaviour", "kind", "value"), tuple(rows), f"mean change of the {behaviour}")


def _integrity(sweep: _Sweep) -> Report:
    """That the strongest edit does what it says."""
    strongest = max(sweep.doses, key=lambda dose: dose.size)
    return audit(sweep.model, strongest, sweep.contrast, sweep.metric, checks=["integrity"], seed=sweep.seed)


def _called(model: HookedModel, metric: Metric, name: str, contrast: Contrast) -> tuple[str, str]:
    """How to call a score, and what it is to be above 0.

    Raises:
        ConfigError: an answer and a foil that begin with the same token.
    """
    if not isinstance(metric, LogitDifference):
        return name, f"{name} above 0"
    words = {(prompt.answer or "", prompt.foil or "") for prompt in contrast.prompts}
    for answer, foil in words:
        ids = model.token_ids([answer, foil]) if answer and foil else [0, 1]  # the metric says which prompts lack them
        if ids[0] == ids[1]:
            raise ConfigError(
                f"{answer!r} and {foil!r} begin with the same token, {model.tokenizer.decode(ids[:1])!r}, and "
                "only first tokens are scored. Choose words that begin differently."
            )
    answer, foil = words.pop() if len(words) == 1 else ("answer", "foil")
    return f"logit of {answer} minus {foil}", f"{answer} over {foil}"


def _against(change: Tensor) -> Tensor:
    """1 for prompts that moved against the mean."""
    return (change * torch.sign(change.mean()) < 0).double()
