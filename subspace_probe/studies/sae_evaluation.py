"""Do sparse autoencoders give the features that control a task, where the features are known?

Makelov, Lange & Nanda 2024 (arXiv:2405.08366). On a task whose prompts have known attributes (who receives, who gives,
who is named first) a dictionary is fitted with supervision: one vector for each value of each attribute. Autoencoders
trained on the task's activations, on broad text and with a random decoder are held against it by three tests: do their
reconstructions serve the model (sufficiency, necessity), do few features edit an attribute (sparse control), and do
features stand for attributes (interpretability)?

On a user's model prompts come with `prompt`, `label` (any 0 and 1), `answer`, `foil`, and one column of whole numbers
for each attribute.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.diagnostics.auditing import examine
from subspace_probe.diagnostics.random_controls import RandomControls
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.supervised import Codes, SupervisedDictionary
from subspace_probe.interventions.patch import Patch
from subspace_probe.interventions.sources import Source
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.sae_evaluation_prompts import (
    Bench,
    Parts,
    answering,
    columns_of,
    find_cross_section,
    learned,
    organism_of,
    partners,
    parts_of,
    random_dictionary,
    shuffled,
)
from subspace_probe.studies.sae_evaluation_tables import summary
from subspace_probe.studies.sae_evaluation_tests import Arms, approximation, interpretability, sparse_control
from subspace_probe.studies.study import Study, provenance_of


@final
@dataclass(frozen=True)
class Config:
    """Settings; every one is recorded in the report."""

    n_train: int = 2000
    """Prompts the supervised dictionaries are fitted on, and features are interpreted on."""
    n_validation: int = 64
    """Prompts the cross-section is searched on."""
    n_test: int = 400
    """Prompts that every reported number comes from. Raise it where intervals are too wide."""
    attributes: tuple[str, ...] = ("io", "s", "position")
    """Columns with the attributes of each prompt; the first is the one the answer is expected to follow."""
    site: str = ""
    """The cross-section, such as L3.resid_mid. Empty: the earliest residual state that carries the whole answer."""
    where: str = "last"
    """The token it is at."""
    saes: tuple[str, ...] = ()
    """Autoencoders of that site, each name=folder or name=release:id; none for none. Empty: the organism's own."""
    codes: Codes = "mse"
    """Supervised codes: mse, or mean where attributes are independent."""
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of features that an edit may change. 2 is what the supervised edit takes, one out and one in."""
    threshold: float = 0.6
    """F1 from which a feature counts as interpretable; precision and recall are then at least 0.43."""
    draws: int = 40
    """Random dictionaries, and dictionaries of shuffled attributes, behind the nulls; a verdict needs 39."""
    seed: int = 0
    """Of prompts, partners, draws and bootstraps."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"n_train": 600, "n_validation": 40, "n_test": 112},
    "small": {"n_train": 2000, "n_test": 400},
    # published: GPT-2 small, queries, keys, values and outputs of 26 heads; here at one state of any model
    "paper": {"n_train": 20_000, "n_test": 5000},
}

_AUDITED = 64
"""Prompts of the audit, which runs every random subspace on them."""

ABOUT: Mapping[str, str] = {
    "patch_sweep": "Share of the answer that moves when one residual state is exchanged whole.",
    "dictionaries": "The arms: size, mean number of active features, variance explained on test prompts.",
    "attributes": "Share of the variance of the test states that each attribute's codes explain.",
    "approximation": "The metric under reconstructions (sufficiency), and with them taken out (necessity).",
    "edits": "Share of edited prompts with the most likely token of the whole patch, by features changed; affine: 0 is "
    "no edit, 1 the supervised edit; closed: share of the KL to the whole patch that it takes away; removed: share of "
    "the reconstruction taken out.",
    "features": "The features with the highest F1 on held-out prompts, and what they stand for.",
    "interpretable": "Features with an F1 from the threshold on, and what keeping or removing them does.",
    "questions": "What each check asked and found.",
    "summary": "The answer, from the findings.",
}


def run(model: HookedModel, config: Config, *, contrast: Contrast | None = None, progress: bool = True) -> Report:
    """Run the study.

    Args:
        model: any causal language model.
        contrast: prompts with attributes, answer and foil; not needed for an organism, which brings its own.

    Raises:
        ConfigError: no draws; no prompts or autoencoders for a user's model; no state that carries the answer.
        DataError: prompts without answer, foil, attributes, or partners that differ in one attribute only.
        SiteError, ShapeError: an autoencoder of another site.
    """
    began = time.monotonic()
    if len(config.attributes) < 1 or 2 not in config.budgets:
        raise ConfigError("Name at least one attribute, and let the budgets hold 2, what a supervised edit takes.")
    if config.draws < 1:
        raise ConfigError(f"draws={config.draws}: give at least 1 random dictionary, and 39 where a verdict is wanted.")
    parts, where = parts_of(model, config, contrast), Where.parse(config.where)
    site, restored, sweep = find_cross_section(model, parts.validation, config)
    train, test = (model.capture(part, sites=site, where=where) for part in (parts.train, parts.test))
    arms = _arms(model, train, site, config)
    bench = Bench(model, site, where, parts.test)
    expects = bool(organism_of(model))

    findings: list[Finding] = []
    tables: dict[str, list[dict[str, Any]]] = {"patch_sweep": sweep.table.records()}
    for found, rows in (
        approximation(bench, arms, train, test, config, expects),
        sparse_control(bench, arms, train, test, config, expects),
        interpretability(bench, arms, train, test, config),
    ):
        findings += found
        tables |= rows
    audited = _audit(bench, arms.supervised, test, config, progress)
    findings += [replace(f, name=f"edit.{config.attributes[0]}.{f.name}") for f in audited.findings]
    tables["questions"] = audited.tables["questions"].records()
    named = (model.spec.name, site, restored)
    tables["summary"] = [{"sentence": line} for line in summary(*named, findings, tables, config)]
    found_tables = {name: Table.of(rows, ABOUT[name]) for name, rows in tables.items()}
    provenance = _provenance(model, config, parts, site, arms, began)
    return Report("sae_evaluation", tuple(findings), found_tables, provenance)


def _arms(model: HookedModel, train: Activations, site: Site, config: Config) -> Arms:
    """All dictionaries, and those of the nulls."""
    named: dict[str, SparseAutoencoder] = learned(model, site, config)
    like = next(iter(named.values()), None)
    randoms = [random_dictionary(train, site, like, seed=config.seed + i) for i in range(config.draws)]
    columns, states = columns_of(train.contrast, config.attributes), train.at(site)
    fits = [
        SupervisedDictionary.fit(states, shuffled(columns, seed=config.seed + i), kind=config.codes)
        for i in range(config.draws)
    ]
    return Arms(
        SupervisedDictionary.fit(states, columns, kind=config.codes),
        SupervisedDictionary.fit(states, columns, kind="mean"),
        {**named, "random": randoms[0]},
        randoms,
        fits,
    )


def _audit(bench: Bench, known: SupervisedDictionary, test: Activations, config: Config, progress: bool) -> Report:
    """Is it the span of the first attribute's codes that controls the answer, or any span of that rank?"""
    name = config.attributes[0]
    rows, other = partners(columns_of(test.contrast, config.attributes), name, seed=config.seed)
    rows, other = rows[:_AUDITED], other[:_AUDITED]
    asked = test.contrast.take(rows.tolist())
    target = test.contrast.take(other.tolist())
    states = test.at(bench.site)[other]
    source = Source({bench.site: states}, torch.arange(len(other)), bench.where, len(other))
    _, sizes, vectors = torch.linalg.svd(known.codes[name].double(), full_matrices=False)
    span = vectors[sizes > 1e-6 * sizes[0]]
    subspace = Subspace.span(span.float(), site=bench.site, where=bench.where, notes={"finder": "supervised codes"})
    return examine(
        bench.model,
        Patch(source, bench.where, subspace),
        answering(asked, target),
        "logit_difference",
        checks=(RandomControls(config.draws), "integrity"),
        seed=config.seed,
        progress=progress,
    ).report


def _provenance(model: HookedModel, config: Config, parts: Parts, site: Site, arms: Arms, began: float) -> Provenance:
    return provenance_of(
        model,
        config,
        data=f"{parts.train.name}: {len(parts.train)} train, {len(parts.test)} test",
        began=began,
        more={"cross_section": site.short, "saes_used": {k: repr(v) for k, v in arms.saes.items()}},
    )


STUDY = Study(
    title="Do sparse autoencoders find the features that control a task?",
    citation="Makelov, Lange & Nanda 2024, arXiv:2405.08366",
    Config=Config,
    run=run,
    presets=PRESETS,
    organisms={"": ("chat",)},
)
