"""Does an exchange that turns the answer around show what the model uses?

Makelov, Lange & Nanda 2023 (arXiv:2311.17030), on indirect object identification: a direction found by DAS in an MLP
moves the answer although the whole MLP does not, because a part that nothing reads supplies the value and a part that
never varies writes it; one found in the residual stream is what the heads that fetch the name ask by. Both are split
by what reads them, and set beside the whole state, the mean difference, the gradient and random directions. The second
half is about facts: a direction fitted to each pair, and the edit of rank one that does the same.

Two numbers are kept apart: the share of the logit difference that is lost (FLDD, 1 - mean patched / mean clean: 0
nothing, 1 erased, 2 turned around), and interchange accuracy (IIA), the share of prompts whose likeliest token of the
whole vocabulary is the other name.

On a model of one's own: `contrast` holds minimal pairs (columns `prompt`, `label`, `pair`, `answer`, and `foil` where
partners share their answer's form) whose partners have different answers, and the sites are settings. Nothing is
planted into it, and nothing is expected of it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.findings import Expectation, Finding
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.data import load_contrast
from subspace_probe.diagnostics.auditing import examine
from subspace_probe.diagnostics.natural import Natural
from subspace_probe.diagnostics.random_controls import RandomControls
from subspace_probe.finders.das import DAS
from subspace_probe.finders.mean_difference import MeanDifference
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.interventions.patch import Patch
from subspace_probe.interventions.sources import Source
from subspace_probe.metrics import metric_for
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import language_of, load_truth, organism_contrast
from subspace_probe.organisms.gadgets import Gadget, plant_gadget
from subspace_probe.studies.patching_illusion_facts import fact_findings
from subspace_probe.studies.patching_illusion_heads import fetching_heads, query_space
from subspace_probe.studies.patching_illusion_tables import (
    Bench,
    before,
    gadget_finding,
    mlp_findings,
    stream_findings,
    summary,
)
from subspace_probe.studies.study import Study, of_audits, provenance_of


@final
@dataclass(frozen=True)
class Config:
    """Settings; every one is recorded in the report."""

    mlp: str = ""
    """MLP whose hidden units are searched, as `L8.mlp_post`. Empty: the organism's, with a gadget planted there."""
    residual: str = ""
    """State of the residual stream that is searched, as `L8.resid_post`. Empty: where the organism's variable is."""
    kappa: float = 2.5
    """Strength of the gadget planted into an organism: what an exchange along it writes, in class gaps."""
    where: str = "last"
    """Token at which states are exchanged."""
    n_train: int = 256
    """Prompts that directions are fitted on."""
    n_test: int = 128
    """Prompts that every number comes from."""
    steps: int = 200
    """Of the training of each direction."""
    restarts: int = 2
    """Random starts of DAS beside the two linearised ones; the best by training loss counts."""
    least_share: float = 0.1
    """A head is named if it carries at least so much of the logit difference to the logits, past all others."""
    most_heads: int = 3
    """At most so many heads are named, the strongest; three, as published. All heads together would see everything."""
    draws: int = 40
    """Random directions behind each null; 39 are the fewest that a verdict can rest on."""
    facts: str = ""
    """File of facts in pairs that ask the same of two subjects: columns `prompt`, `label`, `pair` and `answer`. Empty:
    the organism's own, and none on other models."""
    fact_where: str = "last"
    """Token at which facts are exchanged. Published: the subject's last one, such as `last-1`. The organism's subjects
    are single words, which are looked up at the last token."""
    n_facts: int = 48
    """Prompts with facts."""
    fact_steps: int = 60
    """Of the training of the direction of each pair."""
    seed: int = 0
    """Of prompts, gadget, training, draws and bootstraps."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"n_train": 160, "n_test": 96, "steps": 100, "restarts": 0, "n_facts": 32, "fact_steps": 40},
    "small": {"n_train": 200, "n_test": 200, "steps": 200},
    # GPT-2 small; 2000 test prompts, 200 train pairs, of which the published half that are identical is left out
    "paper": {
        "mlp": "L8.mlp_post", "residual": "L8.resid_post", "n_train": 200, "n_test": 2000, "steps": 300,
        "restarts": 4, "draws": 100,
    },
}  # fmt: skip
CHECKS = ("integrity", "exchange", "containment", "reader_split", "dormancy", "capacity")
"""Asked of both directions found by DAS, besides random directions."""

ABOUT: Mapping[str, str] = {
    "effects": "What was exchanged at the last token of held-out prompts: FLDD (0 nothing, 1 the margin is erased, 2 "
    "turned around) and interchange accuracy over the whole vocabulary.",
    "heads": "Share of the logit difference that each later head carries to the logits (path patching, all other "
    "heads frozen), on train prompts.",
    "facts": "Facts exchanged at the subject's token, by layer: share of prompts that answer as their partner, and "
    "rewrite score (p' - p) / (1 - p) of the partner's answer. Directions are judged on the pair they were fitted to.",
    "nulls": "FLDD of random directions, and of the direction found.",
    "questions": "What each check asked and found.",
    "summary": "The answer, from the findings.",
}


def run(model: HookedModel, config: Config, *, contrast: Contrast | None = None, progress: bool = True) -> Report:
    """Run the study.

    Args:
        model: a decoder; of an organism `ioi` nothing more is needed.
        contrast: minimal pairs whose partners answer differently; train and test prompts are taken from it.

    Raises:
        ConfigError: pairs or sites are missing on a model that is no organism of this task.
        DataError: pairs without answers, too few of them, or partners that the model does not tell apart.
    """
    began = time.monotonic()
    if config.draws < 1:
        raise ConfigError(f"draws={config.draws}: every exchange is compared with random ones. A verdict takes 39.")
    train, test = _prompts(model, config, contrast)
    _require_the_task(model, test)
    mlp, stream, where = *_sites(model, config), Where.parse(config.where)
    planted, gadget = _planted(model, config, train, mlp, where)
    movers = fetching_heads(planted, train, stream, where, config.least_share, config.most_heads, config.seed)
    asked_by = query_space(planted, stream, movers.named)
    found = {site: _directions(planted, train, site, where, config, progress) for site in (mlp, stream)}
    if gadget is not None:
        found[mlp]["planted"] = gadget.direction
    exams = {
        name: _examined(planted, found[site]["DAS"], test, config, progress)
        for name, site in {"mlp": mlp, "residual": stream}.items()
    }
    benches = {site: Bench(planted, test, site, where, config.draws, config.seed) for site in (mlp, stream)}
    known = gadget is not None
    findings = [*before(benches[stream], known), *gadget_finding(gadget), *movers.findings(known)]
    rows: list[dict[str, Any]] = []
    nulls: list[dict[str, Any]] = []
    for name, site, space, tell in (
        ("mlp", mlp, benches[mlp].read_space, mlp_findings),
        ("residual", stream, asked_by, stream_findings),
    ):
        effects = benches[site].effects(found[site], space)
        findings += tell(effects, known)
        rows += effects.rows(name)
        nulls += effects.nulls(name)
    audits, questions = of_audits(exams)
    findings += audits
    facts, fact_rows = _facts(model, config, progress)
    findings += facts
    tables: dict[str, list[dict[str, Any]]] = {
        "effects": rows, "heads": movers.rows(), "facts": fact_rows, "nulls": nulls, "questions": questions,
        "summary": [{"sentence": line} for line in summary(model.spec.name, findings, movers)],
    }  # fmt: skip
    report = {name: Table.of(records, ABOUT[name]) for name, records in tables.items() if records}
    report |= {name: exams["mlp"].tables[name] for name in ("illusion", "dormancy", "capacity")
               if name in exams["mlp"].tables}  # fmt: skip
    return Report("patching_illusion", tuple(findings), report, _provenance(model, config, train, test, found, began))


def _prompts(model: HookedModel, config: Config, contrast: Contrast | None) -> tuple[Contrast, Contrast]:
    """Train and test prompts, which share no group."""
    if contrast is not None:
        size = config.n_train + config.n_test
        train, test = contrast.split(config.n_train / size, seed=config.seed)
        return train.first_pairs(config.n_train // 2), test.first_pairs(config.n_test // 2)
    name = organism_of(model)
    if not name:
        raise ConfigError(
            f"{model.spec.name} brings no pairs of its own. Give contrast=, minimal pairs with the columns prompt, "
            "label (0 or 1), pair and answer, whose partners have different answers."
        )
    train, test = (
        organism_contrast(f"{name}/ioi", split=split, n=n, seed=config.seed)
        for split, n in (("train", config.n_train), ("test", config.n_test))
    )
    return train, test


def _require_the_task(model: HookedModel, test: Contrast) -> None:
    """There is no mechanism of an answer that is not given.

    Raises:
        DataError: fewer than half of the answers are right.
    """
    right = float(outcomes(model, test.prompts, [None], [metric_for("accuracy", model)])[0, 0].mean())
    if right < 0.5:
        raise DataError(
            f"{model.spec.name} gives the right answer to {right:.0%} of the prompts, so there is nothing that an "
            "exchange could turn around. Give prompts that it answers."
        )


def organism_of(model: HookedModel) -> str:
    """Name of the organism of this task that a model is; empty for any other."""
    if model.directory is None or not (model.directory / "truth.json").is_file():
        return ""
    name = load_truth(model.directory).organism
    return name if language_of(name) == "naming" else ""


def _sites(model: HookedModel, config: Config) -> tuple[Site, Site]:
    """The MLP's hidden units and the residual stream."""
    given = {name: getattr(config, name) for name in ("mlp", "residual")}
    if organism_of(model) and model.directory is not None:
        layer = load_truth(model.directory).planted("position").site.layer
        defaults = {"mlp": f"L{layer}.mlp_post", "residual": f"L{layer}.resid_post"}
        given = {name: site or defaults[name] for name, site in given.items()}
    missing = [name for name, site in given.items() if not site]
    if missing:
        raise ConfigError(
            f"Settings without a site on {model.spec.name}: {', '.join(missing)}. Give mlp='L8.mlp_post' and "
            "residual='L8.resid_post', with a layer below the heads that fetch the answer."
        )
    mlp, residual = (Site.parse(site).resolve(model.spec.n_layers) for site in given.values())
    if mlp.stream != "mlp_post" or residual.stream not in ("resid_pre", "resid_mid", "resid_post"):
        raise ConfigError(f"The sites given are {mlp.short} and {residual.short}. Give mlp_post and a residual stream.")
    return mlp, residual


def _planted(
    model: HookedModel, config: Config, train: Contrast, mlp: Site, where: Where
) -> tuple[HookedModel, Gadget | None]:
    """An organism with a gadget in its MLP, which then hosts an illusion; any other model as it is."""
    if not organism_of(model):
        return model, None
    changed, gadget = plant_gadget(model, train, mlp.layer, where, kappa=config.kappa, seed=config.seed)
    return changed, gadget


def _directions(
    model: HookedModel, train: Contrast, site: Site, where: Where, config: Config, progress: bool
) -> dict[str, Subspace]:
    """One direction a method, all of rank one."""
    das = DAS(
        steps=config.steps, restarts=config.restarts, opposite=True, same=0.0, controls=(), seed=config.seed
    )  # fmt: skip
    acts = model.capture(train, sites=site, where=where)
    return {
        "DAS": das.fit(model, train, site, where, progress=progress),
        "mean difference": MeanDifference(null_draws=0).fit(acts, acts.sites[0]),
        "gradient": gradient_direction(model, train, site, where),
    }


def gradient_direction(model: HookedModel, train: Contrast, site: Site, where: Where) -> Subspace:
    """The mean gradient of the logit difference, from base to source, of both sides of the pairs."""
    pairs = Natural(model, train, site, where, metric_for("logit_difference", model), pairs=len(train))
    sign = torch.where(pairs.row_labels == 1, -1.0, 1.0)
    mean = (pairs.path_gradients * sign[:, None]).double().mean(0)
    return Subspace.span(mean / mean.norm(), site=site, where=where, notes={"finder": "gradient"})


def _examined(model: HookedModel, subspace: Subspace, test: Contrast, config: Config, progress: bool) -> Report:
    """The audit of an exchange of answers within a direction, on held-out pairs."""
    clean, corrupt = test.sides()
    site, where = subspace.site, subspace.where
    if site is None or where is None:
        raise RuntimeError("a finder gives the place")
    patch = Patch(Source.of(model.capture(clean, sites=site, where=where)), where, subspace)
    checks = (RandomControls(config.draws), *CHECKS)
    return examine(
        model,
        patch,
        corrupt,
        "logit_difference",
        checks=checks,
        natural=test,
        seed=config.seed + 1000,
        progress=progress,
    ).report  # seeds of draws are away from that of the organism's own planted vector


def _facts(model: HookedModel, config: Config, progress: bool) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Facts, where there are any."""
    name = organism_of(model)
    if config.facts:
        facts = load_contrast(config.facts)
    elif name:
        facts = organism_contrast(f"{name}/facts", n=config.n_facts, seed=config.seed)
    else:
        reason = "no facts were given (facts=)"
        return [Finding("facts.edit_difference", "an edit equals a patch", float("nan"), verdict="not tested",
                        note=reason)], []  # fmt: skip
    where = Where.parse(config.fact_where)
    return fact_findings(
        model, facts.first_pairs(config.n_facts // 2), where, steps=config.fact_steps, seed=config.seed,
        expected=Expectation(below=1e-6) if name else None, progress=progress,
    )  # fmt: skip


def _provenance(
    model: HookedModel,
    config: Config,
    train: Contrast,
    test: Contrast,
    found: Mapping[Site, Mapping[str, Subspace]],
    began: float,
) -> Provenance:
    return provenance_of(
        model,
        config,
        data=f"{train.name}: {len(train)} train, {len(test)} test",
        began=began,
        more={"sites": [site.short for site in found]},
    )


STUDY = Study(
    title="Does an exchange that turns the answer around show what the model uses?",
    citation="Makelov, Lange & Nanda 2023, Is This the Subspace You Are Looking for? (arXiv:2311.17030)",
    Config=Config,
    run=run,
    presets=PRESETS,
    # one organism: a seed draws other prompts, another gadget, other starts and other nulls
    organisms={"": ("ioi",)},
)
