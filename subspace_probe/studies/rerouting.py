"""Can the states that make a model decline be taken elsewhere, by whom, and does repair help?

Winninger et al. 2025 (arXiv:2503.06269, subspace rerouting): a layer where the class is read well is a target; states
are taken to the other class by writing them, by shifting embeddings and by choosing other tokens, each beside its
controls; a search for the target is compared with one for the answer itself and with chance, at equal budgets. Where it
is asked for, a copy is trained on what was found and searched again, with targets of its own. A guard whose states can
be moved but that no token moves is "steerable, not reachable".

A robustness evaluation of one's own model: token ids and rates. For a model of one's own, `contrast` has `prompt`,
`label` (1 for prompts that are declined), `answer` (how the model answers) and `foil` (the other behaviour), and `free`
names the tokens of each prompt that may be changed. Not here: attention targets, and judging what completions say.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Expectation, Finding
from subspace_probe.core.protocols import Metric
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.core.sites import resid_post
from subspace_probe.core.tokens import LAST
from subspace_probe.diagnostics.auditing import examine
from subspace_probe.diagnostics.climber import Effort
from subspace_probe.diagnostics.eligibility import targets_of
from subspace_probe.diagnostics.ladder import ladder
from subspace_probe.diagnostics.random_controls import RandomControls
from subspace_probe.diagnostics.search_comparison import ANSWER, RANDOM, Searches, compare_searches
from subspace_probe.finders.mean_difference import MeanDifference
from subspace_probe.interventions.embedding_search import EmbeddingSearch
from subspace_probe.interventions.reroute import Reroute
from subspace_probe.interventions.targets import HalfSpace
from subspace_probe.interventions.token_search import TokenSearch
from subspace_probe.metrics import metric_for
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.rerouting_prompts import Ground, ground_for
from subspace_probe.studies.rerouting_repair import repaired_findings
from subspace_probe.studies.rerouting_tables import (
    answer_findings,
    expected_rates,
    percentile_findings,
    probed,
    read_findings,
    summary,
)
from subspace_probe.studies.study import Study, provenance_of


@final
@dataclass(frozen=True)
class Config:
    """Settings; every one is recorded in the report."""

    n_train: int = 256
    """Prompts that directions are fitted on, both classes together, and that repair trains on."""
    n_test: int = 40
    """Prompts that are rerouted; 16 are the fewest whose failures can refute that tokens reach the target."""
    n_clean: int = 400
    """Other held-out prompts of both classes, for the accuracies."""
    free: str = ""
    """Tokens that may be changed: last-2,last-1 or 7,8 or span:some words. Organisms have theirs."""
    allowed: str = ""
    """The only token ids to use, as 16-55,60; all but special ones where nothing is given."""
    banned: str = ""
    """Token ids not to use."""
    metric: str = "logit_difference"
    """Behaviour whose sign is to flip."""
    targets: int = 1
    """How many eligible layers are targets, the earliest first: rows of an early one are cheap."""
    budget: int = 1000
    """Rows the model may be run on for each prompt, in every token search."""
    width: int = 32
    """Candidates in each step of a token search."""
    top_k: int = 32
    """Best tokens of each position that candidates are drawn from; raise it with the vocabulary."""
    radius: float = 1.0
    """Of the embedding level, in distances between neighbouring tokens."""
    draws: int = 40
    """Random directions behind the audit of the activation level; 39 are the fewest that a verdict can rest on."""
    permutations: int = 39
    """Label permutations behind the gate; 19 are the fewest that can let a layer pass."""
    repair: bool = False
    """Train a copy on what was found, and search it again."""
    repair_steps: int = 200
    """Steps of that training."""
    repair_rate: float = 1e-4
    """Its learning rate; about 1e-5 for a model of a billion weights."""
    n_exhaustive: int = 0
    """Rerouted prompts on which every choice of tokens is run after repair, where there are few enough choices."""
    seed: int = 0
    """Of splits, draws, searches and training."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # a tenth of the 1600 suffixes that organisms have
    "tiny": {
        "n_train": 128, "n_test": 16, "n_clean": 300, "budget": 160, "permutations": 19,
        "repair": True, "repair_steps": 60, "n_exhaustive": 4,
    },
    "small": {"n_test": 24, "budget": 2000, "width": 128, "top_k": 128, "permutations": 19},
    # 60 steps of 512 candidates, among the 256 best tokens
    "paper": {"n_test": 60, "budget": 30720, "width": 512, "top_k": 256, "targets": 3},
}  # fmt: skip

AHEAD = Expectation(above=0.5)
"""Where a pair of tokens is planted, a tenth of the exhaustive budget beats chance by at least this."""

ABOUT: Mapping[str, str] = {
    "probes": "How well the class is read at each layer; the cosine between probe and mean difference, and its range "
    "for unrelated directions of such states. Eligible by accuracy; targets were tested by permutation as well.",
    "curve": "Share of prompts that each search had flipped within a budget.",
    "repair": "The model before and after training on the found tokens.",
    "summary": "The answer, from the findings.",
}


def run(model: HookedModel, config: Config, *, contrast: Contrast | None = None, progress: bool = True) -> Report:
    """Run the study.

    Args:
        model: a decoder; a guard organism brings prompts, free positions and tokens of its own.
        contrast: prompts with `label`, `answer` and `foil`; not needed for an organism.

    Raises:
        ConfigError: neither an organism nor prompts with free positions.
        DataError: too few prompts.
        PositionError: free positions that differ in number between prompts, or come after the target's token.
    """
    began = time.monotonic()
    ground, metric = ground_for(model, config, contrast), metric_for(config.metric, model)
    acts = model.capture(ground.train, sites=resid_post(), where=LAST)
    layers, findings = probed(acts, config.seed), read_findings(model, acts, ground, config.seed)
    eligible = [site for site, row in zip(acts.sites, layers, strict=True) if row["eligible"]][: config.targets]
    tables = {"probes": Table.of(layers, ABOUT["probes"])}
    if eligible:
        targets = targets_of(acts, MeanDifference(null_draws=0), eligible)
        climbed = _climbed(model, ground, targets, config, progress)
        findings += expected_rates(climbed, ground)
        findings += percentile_findings(climbed, ground.moved, config.seed)
        findings += _audited(model, ground, targets[0], config, progress)
        searches = _searched(model, ground, targets, metric, config, progress)
        findings += answer_findings(searches, targets[0], ground, config.seed)
        findings += _compared(searches, ground, config)
        tables |= {name: table for name, table in climbed.tables.items() if name != "summary"}
        tables["curve"] = Table.of(searches.curve(_budgets(config.budget), seed=config.seed), ABOUT["curve"])
        if config.repair:
            again, rows = repaired_findings(model, ground, searches, config, progress)
            findings += again
            tables["repair"] = Table.of(rows, ABOUT["repair"])
    lines = summary(model.spec.name, findings, tables)
    tables["summary"] = Table.of([{"sentence": line} for line in lines], ABOUT["summary"])
    return Report("rerouting", tuple(findings), tables, _provenance(model, config, ground, began))


def _climbed(model: HookedModel, ground: Ground, targets: list[HalfSpace], config: Config, progress: bool) -> Report:
    """Every target at every level; the searches it is compared with come after, for all targets together."""
    effort = Effort(
        EmbeddingSearch(radius=config.radius), _search(config), permutations=config.permutations, baselines=False
    )
    return ladder(
        model,
        ground.test,
        targets,
        ground.free,
        config.metric,
        train=ground.train,
        effort=effort,
        allowed=ground.allowed,
        banned=ground.banned,
        ineligible="flag",
        seed=config.seed,
        progress=progress,
    )


def _search(config: Config) -> TokenSearch:
    return TokenSearch(budget=config.budget, width=config.width, top_k=config.top_k, seed=config.seed)


def _searched(
    model: HookedModel, ground: Ground, targets: list[HalfSpace], metric: Metric, config: Config, progress: bool
) -> Searches:
    return compare_searches(
        model,
        ground.moved,
        targets,
        ground.free,
        metric,
        search=_search(config),
        allowed=ground.allowed,
        banned=ground.banned,
        progress=progress,
    )


def _budgets(budget: int) -> list[int]:
    """The budget and its halves."""
    return sorted({max(1, budget // 2**halvings) for halvings in range(5)})


def _compared(searches: Searches, ground: Ground, config: Config) -> list[Finding]:
    """The target against the other searches, at the whole budget and at half of it."""
    depth = searches.model.spec.n_layers
    found = [searches.ahead(RANDOM, config.budget, seed=config.seed)]
    if ground.suffixes is not None and ground.suffixes.planted:
        found = [replace(found[0], expected=AHEAD)]
    if ANSWER in searches.found:
        for budget in (config.budget, config.budget // 2):
            found.append(searches.ahead(ANSWER, budget, seed=config.seed))
            found.append(searches.ahead(ANSWER, budget * depth, "layer-forwards", seed=config.seed))
        found.append(searches.cost(ANSWER, seed=config.seed))
    return found


def _audited(model: HookedModel, ground: Ground, target: HalfSpace, config: Config, progress: bool) -> list[Finding]:
    """Writing the state of the first target, against random directions of equal length."""
    exam = examine(
        model,
        Reroute(target),
        ground.moved,
        config.metric,
        checks=(RandomControls(config.draws), "integrity"),
        seed=config.seed,
        progress=progress,
    )
    return [replace(finding, name=f"activation.{finding.name}") for finding in exam.report.findings]


def _provenance(model: HookedModel, config: Config, ground: Ground, began: float) -> Provenance:
    return provenance_of(
        model,
        config,
        data=f"{ground.train.name}: {len(ground.train)} train, {len(ground.moved)} rerouted, {len(ground.clean)} more",
        began=began,
        more={"free": ", ".join(map(str, ground.free))},
    )


STUDY = Study(
    title="Can the states that make a model decline be taken elsewhere, by whom, and does repair help?",
    citation="Winninger et al. 2025, arXiv:2503.06269",
    Config=Config,
    run=run,
    presets=PRESETS,
    organisms={
        "override": ("override", "override-1", "override-2"),
        "robust": ("robust", "robust-1", "robust-2"),
    },
)
