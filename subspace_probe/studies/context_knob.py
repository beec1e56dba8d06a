"""Is there one direction that decides whether this model answers from the context or from memory?

Minder et al. 2024 (arXiv:2411.07404) tune models to heed a written intent, look for the layers where it is taken up,
find one direction behind them by interchange, and set its coordinate to a constant with the intent left out: the knob.
The same direction and constants then turn models that were not tuned. This study does so in that order: first whole
states, exchanged at every layer and position, since a direction is only to be found where a whole state works; then the
direction; then the constants, chosen on prompts of their own. Beside every figure stand directions orthogonal to the
knob that move every prompt as far.

An answer is what the first token of the reply says. Directions are trained and tried with sources of another question,
whose answer is of no use, so that what turns the answer is the intent; published are sources of the same question.

A model of your own needs a contrast with the columns `prompt` (or `messages`), `label` (1 where the context counts, 0
where memory does), `pair` (one number for the two prompts of a context and query) and `answer`; `group` where several
pairs share a source; and the settings `context_text`, `prior_text` and `base`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.core.sites import Site, resid_post
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST, Where
from subspace_probe.diagnostics.auditing import Examination, examine
from subspace_probe.diagnostics.random_controls import RandomControls
from subspace_probe.finders.das import DAS
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.interventions.exchange_scan import exchange_scan, exchange_within, source_rows
from subspace_probe.interventions.knob import KnobClamp
from subspace_probe.linalg.bases import random_subspace
from subspace_probe.metrics.answers import Accuracy
from subspace_probe.models import load_model
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import ORGANISMS, organism_path
from subspace_probe.studies.context_knob_clamps import Knob, calibrated, clamp_findings, specificity, sweep_rows
from subspace_probe.studies.context_knob_prompts import Prompts, confident, prompts_for, scanned, texts_at
from subspace_probe.studies.context_knob_tables import (
    ABOUT,
    Scan,
    answers,
    exchange_findings,
    layer_rows,
    scan_findings,
    scan_rows,
    search_rows,
    summary,
    truth_of,
    written_findings,
    written_rows,
)
from subspace_probe.studies.context_knob_variants import correlation_findings, correlation_rows, variants
from subspace_probe.studies.study import Study, of_audits, provenance_of


@final
@dataclass(frozen=True)
class Config:
    """Settings; every one is recorded in the report."""

    base: str = ""
    """The untuned model that the same knob is tried on: a folder, a hub id or organism:NAME; "none" leaves it out.
    Empty: an organism's own companion."""
    context_text: str = ""
    """How the intent to answer from the context is written in the prompts (label 1). Organisms know theirs."""
    prior_text: str = ""
    """How the intent to answer from memory is written (label 0)."""
    neutral_text: str = ""
    """What stands in the place of either where the knob is used; empty as published."""
    other_texts: tuple[str, ...] = ()
    """Further formats of the intent, each as 'prior|context', such as 'Context weight: 0.00|Context weight: 1.00'."""
    n_train: int = 512
    """Prompts the direction is trained on; pairs that the model does not answer as told are left out, as published."""
    n_validation: int = 160
    """Prompts that the layer and the constants are chosen on."""
    n_test: int = 400
    """Prompts that every reported figure comes from, two to a pair. Raise it where intervals are too wide."""
    positions: int = 12
    """Last tokens of a prompt that are scanned."""
    most_layers: int = 6
    """Layers at which a direction is looked for, those where whole states work best; the last layer comes besides."""
    steps: int = 200
    """Of training at each layer."""
    restarts: int = 1
    """Random starts besides the linearised one, at each layer."""
    strengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
    """Constants to choose from, as distance from the middle of the class means in gaps: 0.5 is the means themselves."""
    draws: int = 40
    """Orthogonal directions behind the nulls; 39 are the fewest that a verdict can rest on."""
    shares: int = 9
    """Models on the line from the base to the tuned one, over which separation is compared with performance."""
    readout: str = "final"
    """Where the layer search reads answers: "final" at the output, "identity" in the state of every layer, as
    published; the latter needs a model that can repeat a word."""
    seed: int = 0
    """Of draws, splits and bootstraps."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "n_train": 160,
        "n_validation": 80,
        "n_test": 160,
        "most_layers": 2,
        "steps": 40,
        "restarts": 0,
        "shares": 4,
    },
    "small": {"n_train": 256, "n_validation": 100, "n_test": 300, "most_layers": 4},
    "paper": {"n_train": 2048, "n_validation": 400, "n_test": 1000, "steps": 256, "readout": "identity"},
}
_SCANNED = 40
"""Pairs in the scan, which is run at every layer and position."""
AUDITED = ("integrity", "specificity", "exchange", "containment", "readable")
"""The checks on the clamp, besides random directions."""


def run(model: HookedModel, config: Config, *, contrast: Contrast | None = None, progress: bool = True) -> Report:
    """Run the study.

    Args:
        model: one that heeds a written intent.
        contrast: questions under both intents; see above. Not needed for the knob organisms, which bring their own.

    Raises:
        ConfigError: no prompts or base for this model, or the words of its intents are not given.
        DataError: half pairs, prompts without answers, or too few.
    """
    began = time.monotonic()
    if config.draws < 1 or not config.strengths:
        raise ConfigError(
            f"draws={config.draws} and {len(config.strengths)} strengths were asked for. The clamp is compared with "
            "orthogonal directions, of which a verdict takes 39, and its constants are chosen among strengths."
        )
    data = prompts_for(model, config, contrast)
    base = base_of(model, config)
    truth = truth_of(model) if contrast is None else ""  # of prompts of one's own nothing is known
    answered = answers(model, data)
    written = written_rows("tuned", answered) + ([] if base is None else written_rows("base", answers(base, data)))
    findings = written_findings(answered, truth, config.seed)

    train = confident(data.train, _right(model, data.train))
    scan = scan_states(model, train, data.validation, config)
    findings += scan_findings(scan, truth, config.seed)
    found = directions(model, train, scan, config, progress)
    sources = source_rows(data.validation, another=True, seed=config.seed)
    rates = exchange_within(model, data.validation, sources, list(found.values())).mean(1)
    best = list(found.values())[int(rates[:-1].argmax())]
    findings += exchange_findings(model, data.test, best, found[max(found)], truth, config)

    knob, sweep = calibrated(model, best, data, config)
    findings += clamp_findings(model, knob, data, truth, config)
    findings += clamp_findings(base, knob, data, truth, config, name="base")
    findings += specificity(model, knob, data, config.seed)
    points = [] if base is None else variants(base, model, knob, data, config)
    findings += correlation_findings(points, config)
    exams = _examined(model, knob, data, config, progress)
    audits, questions = of_audits({name: exam.report for name, exam in exams.items()})
    findings += audits

    rows: dict[str, Sequence[Mapping[str, Any]]] = {
        "written": written,
        "patch_sweep": scan_rows(scan),
        "search": search_rows(model, data.validation, config),
        "knob_layers": layer_rows(model, data.test, found, best, config.seed),
        "strength": sweep_rows(sweep),
        "nulls": [row for f in findings for row in knob.draws.get(f.name, ())],
        "knob_variants": correlation_rows(points),
        "questions": questions,
        "summary": [{"sentence": line} for line in summary(model.spec.name, best, knob.strength, findings)],
    }
    tables = {name: Table.of(records, ABOUT[name]) for name, records in rows.items() if records}
    return Report("context_knob", tuple(findings), tables, _provenance(model, config, data, knob, base, began))


def base_of(model: HookedModel, config: Config) -> HookedModel | None:
    """The untuned model; None where there is none.

    Raises:
        ConfigError: nothing is said about it, and the model is no organism.
    """
    organism = model.spec.name.removeprefix("organism:")
    name = config.base
    if not name and organism != model.spec.name:
        kind, dash, number = organism.partition("-")
        companion = f"{kind}-base{dash}{number}"
        name = f"organism:{companion}" if companion in ORGANISMS else "none"
    if not name:
        raise ConfigError(
            f"Which model {model.spec.name} was tuned from is not known. Set base to its folder or hub id, on which "
            "the same knob is tried; base=none leaves that part out."
        )
    if name == "none":
        return None
    if name.startswith("organism:"):
        return load_model(organism_path(name.removeprefix("organism:"))).named(name)
    return load_model(name, dtype=model.backend.dtype, device=str(model.backend.device))


def scan_states(model: HookedModel, train: Contrast, contrast: Contrast, config: Config) -> Scan:
    """States exchanged at every layer and position: whole ones within a question, and one direction between questions.

    The direction is the difference of the intents' means on training prompts, which costs no training.
    """
    some = contrast.first_pairs(_SCANNED)
    positions = scanned(model, some, config)
    sources = source_rows(some, another=True, seed=config.seed)
    # the partner of a source has its question and the prompt's own intent
    partners = source_rows(some, another=False)
    along: list[Tensor] = []
    control: list[Tensor] = []
    for where in positions:
        gaps = _mean_differences(model, train, where)
        along.append(exchange_within(model, some, sources, gaps, where=where))
        best = gaps[int(along[-1].mean(1).argmax())]
        control.append(exchange_within(model, some, partners[sources], [best], where=where)[0])
    whole = exchange_scan(model, some, partners, positions)
    return Scan(
        some, tuple(positions), tuple(texts_at(model, some, positions)), whole, torch.stack(along, 1),
        torch.stack(control),
    )  # fmt: skip


def _mean_differences(model: HookedModel, train: Contrast, where: Where) -> list[Subspace]:
    """Behind every layer; a random direction where the intents' states are the same, as before they are written."""
    acts = model.capture(train, sites=resid_post(), where=where)
    labels = acts.labels == 1
    found: list[Subspace] = []
    for site in acts.sites:
        states = acts.at(site).double().cpu()
        gap = states[labels].mean(0) - states[~labels].mean(0)
        same = float(gap.norm()) <= 1e-6 * float(states.norm(dim=1).mean())
        vector = random_subspace(1, len(gap), seed=0)[0].double() if same else gap
        found.append(Subspace.span(vector, site=site, where=where))
    return found


def directions(model: HookedModel, train: Contrast, scan: Scan, config: Config, progress: bool) -> dict[int, Subspace]:
    """One direction a layer at the last token, where the scan's works best among whole states that do; and the last."""
    finder = DAS(
        steps=config.steps, restarts=config.restarts, same=0.0, batch_size=64, controls=(), seed=config.seed
    )  # fmt: skip
    last = model.spec.n_layers - 1
    # no direction of a state does more than the whole of it
    promise = scan.along[:last, 0].mean(-1) * (scan.whole[:last, 0].mean(-1) > 0.5)
    order = promise.argsort(descending=True, stable=True)[: config.most_layers]
    layers = [*sorted(order.tolist()), last]
    return {layer: finder.fit(model, train, Site(layer), LAST, progress=progress) for layer in layers}


def _right(model: HookedModel, contrast: Contrast) -> Tensor:
    return outcomes(model, contrast.prompts, [None], [Accuracy(model)])[0, 0]


def _examined(model: HookedModel, knob: Knob, data: Prompts, config: Config, progress: bool) -> dict[str, Examination]:
    """The audits of both settings, each on the prompts without an intent; the line on mechanism is asked once."""
    unstated = data.under(data.test, "none")
    found: dict[str, Examination] = {}
    for name, label in (("context", 1), ("prior", 0)):
        clamp = KnobClamp(knob.direction, knob.values[label], where=LAST)
        checks = AUDITED if label else AUDITED[:2]
        found[name] = examine(
            model,
            clamp,
            unstated.where(label=label),
            "logit_difference",
            checks=(RandomControls(config.draws), *checks),
            natural=data.test,
            neutral=data.others,
            pairs=48,
            seed=config.seed,
            progress=progress,
        )
    return found


def _provenance(
    model: HookedModel, config: Config, data: Prompts, knob: Knob, base: HookedModel | None, began: float
) -> Provenance:
    return provenance_of(
        model,
        config,
        data=f"{data.train.name}: {len(data.train)} train, {len(data.validation)} validation, {len(data.test)} test",
        began=began,
        more={
            "base": "none" if base is None else base.spec.name,
            "direction": repr(knob.direction),
            "constants": list(knob.values),
        },
    )


STUDY = Study(
    title="Is there one direction that decides whether this model answers from the context or from memory?",
    citation="Minder et al. 2024, arXiv:2411.07404",
    Config=Config,
    run=run,
    presets=PRESETS,
    organisms={"knob": ("knob", "knob-1", "knob-2"), "early": ("early", "early-1", "early-2")},
)
