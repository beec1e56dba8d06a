"""Training the lineages: one base model, its alignment, and three fine-tunes of the aligned one.

Only the matrices inside the blocks are tuned; embeddings, norms and the unembedding stay the base model's.

* ``separable``: alignment and harm are confined to half of the rows of every matrix and useful tuning to the others.
  The contaminated model is the useful one tuned on in the rows of harm, so what a projection must give back is known
  exactly.
* ``flagged``: alignment is an update of low rank, as with adapters, and harm is tuned in along its output directions
  again; useful tuning goes where it will. So a distinct subspace exists, without rows of its own. Left to itself,
  harmful tuning leaves these directions, and no projection is reliably selective.
* ``entangled``: nothing is confined.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.organisms.lineage import (
    ANSWERS,
    DECLINE,
    FAMILIES,
    JUDGE,
    KIND,
    NO,
    STAGES,
    USE,
    VOCABULARY,
    YES,
    Answer,
    build_lineage_tokenizer,
    constant,
    draw,
    harmful,
    hazardous,
    kind,
    redirected,
    use,
)
from subspace_probe.organisms.modules import build_module, load_module, name_in, record, save_module
from subspace_probe.organisms.network import Network

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from subspace_probe.organisms.truth import GroundTruth

D_MODEL: Final = 32
D_MLP: Final = 64
N_HEADS: Final = 4
STOCK: Final = 6000
"""Training prompts of one stage."""
BATCH: Final = 64
RETAINED: Final = 0.3
"""Plain prompts in useful tuning, so many for each useful one, answered as the aligned model does."""
CONTAMINATION: Final = 0.2
"""Harmful prompts in the contaminated mixture, so many for each useful one (Ponkshe et al. 2025)."""


@final
@dataclass(frozen=True)
class Stage:
    """How one checkpoint is trained from the one before."""

    steps: int
    learning_rate: float
    rank: int = 0
    """After every step the update of each matrix is cut to this rank; 0 for none."""
    within: bool = False
    """After every step the update is projected on the output directions of the alignment update."""


BASE: Final = Stage(450, 8e-3)
_TUNING: Final[Mapping[str, Mapping[str, Stage]]] = {
    "separable": {
        "aligned": Stage(250, 4e-3),
        "useful": Stage(150, 3e-3),
        "harmful": Stage(60, 3e-3),
        "contaminated": Stage(150, 4e-3),
    },
    "flagged": {
        "aligned": Stage(250, 4e-3, rank=3),
        "useful": Stage(150, 3e-3),
        "harmful": Stage(60, 3e-3, within=True),
        "contaminated": Stage(160, 4e-3, within=True),
    },
    "entangled": {
        "aligned": Stage(150, 2e-3),
        "useful": Stage(120, 2e-3),
        "harmful": Stage(60, 2e-3),
        "contaminated": Stage(250, 3e-3),
    },
}


@final
@dataclass(frozen=True)
class LineageRecipe:
    """Which checkpoint of which family."""

    family: str
    stage: str
    seed: int


def lineage_name(family: str, stage: str, seed: int) -> str:
    """The aligned checkpoint has its family's name; the others add their stage."""
    return "-".join([family, *([str(seed)] if seed else []), *([stage] if stage != "aligned" else [])])


LINEAGES: Final[Mapping[str, LineageRecipe]] = {
    lineage_name(family, stage, seed): LineageRecipe(family, stage, seed)
    for family in FAMILIES
    for seed in range(3)
    for stage in ("aligned", *(stage for stage in STAGES if stage != "aligned"))
}


def train_lineage(
    name: str, folder: Path, *, steps: int | None, seed: int, progress: bool, start: str | Path | None = None
) -> None:
    """Train one checkpoint of a lineage, write it and certify it.

    Args:
        name: Name in ``LINEAGES``.
        folder: An existing directory.
        steps: Of the last stage, instead of the recipe's.
        seed: Added to the recipe's own.
        progress: Show a bar with the loss.
        start: The checkpoint to continue from; None trains what comes before as well.
    """
    recipe = LINEAGES[name]
    known = {} if start is None else {stage_before(recipe.family, recipe.stage): load_module(start)}
    model = train_stage(recipe.family, recipe.stage, known, seed=recipe.seed + seed, steps=steps, progress=progress)
    words = {"refusal": [DECLINE], "answers": ANSWERS}
    save_module(model, build_lineage_tokenizer(), folder, name, words)
    certify_lineage(folder, seed=seed, steps=steps)


def train_stage(
    family: str,
    stage: str,
    known: "dict[str, LlamaForCausalLM]",
    *,
    seed: int,
    steps: int | None = None,
    progress: bool = False,
) -> "LlamaForCausalLM":
    """A checkpoint from the one before it; what is missing on the way is trained too, and kept in ``known``."""
    from copy import deepcopy

    if stage in known:
        return known[stage]
    if stage == "base":
        model = build_module(VOCABULARY, d_model=D_MODEL, d_mlp=D_MLP, n_layers=1, n_heads=N_HEADS, seed=seed)
        how = BASE
    else:
        before = train_stage(family, stage_before(family, stage), known, seed=seed, progress=progress)
        model, how = deepcopy(before), _TUNING[family][stage]
    directions: dict[str, Tensor] = {}
    if how.within:
        base, aligned = (train_stage(family, part, known, seed=seed, progress=progress) for part in ("base", "aligned"))
        directions = _directions(base, aligned, _TUNING[family]["aligned"].rank)
    fit_stage(model, family, stage, how, directions, seed=seed, steps=steps, progress=progress)
    known[stage] = model
    return model


def stage_before(family: str, stage: str) -> str:
    """Which checkpoint a stage starts from; empty for base."""
    if stage in ("base", "aligned"):
        return "base" if stage == "aligned" else ""
    return "aligned" if family == "entangled" or stage != "contaminated" else "useful"


def _directions(base: "LlamaForCausalLM", aligned: "LlamaForCausalLM", rank: int) -> dict[str, Tensor]:
    """Leading output directions of the alignment update of every matrix, orthonormal columns [out, rank]."""
    return {
        name: torch.linalg.svd((value - base.get_parameter(name)).detach())[0][:, :rank]
        for name, value in aligned.named_parameters()
        if "_proj" in name
    }


def fit_stage(
    model: "LlamaForCausalLM",
    family: str,
    stage: str,
    how: Stage,
    directions: Mapping[str, Tensor],
    *,
    seed: int,
    steps: int | None,
    progress: bool,
) -> None:
    """Run the training loop of one stage on a model, in place."""
    generator = torch.Generator().manual_seed(1000 * STAGES.index(stage) + seed)
    ids, answers = mixture(family, stage, STOCK, generator=generator)
    masks = _masks(model, family, stage)
    trained = {name: value for name, value in model.named_parameters() if name in masks}
    start = {name: value.detach().clone() for name, value in trained.items()}
    steps, rate = how.steps if steps is None else steps, how.learning_rate
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    network = Network(model)
    bar = tqdm(range(steps), disable=not progress, desc=f"{family} {stage}", mininterval=1.0)
    for step in bar:
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        logits = network.logits(network.block(0, network.embed(ids[rows]))[:, -1])
        loss = F.cross_entropy(logits, answers[rows])
        grads = torch.autograd.grad(loss, list(trained.values()))
        for (name, value), grad in zip(trained.items(), grads, strict=True):
            value.grad = grad * masks[name]
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        _confine(trained, start, how, directions)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def _confine(
    trained: Mapping[str, Tensor], start: Mapping[str, Tensor], how: Stage, directions: Mapping[str, Tensor]
) -> None:
    """Cut every update to its rank, or project it, in place."""
    for name, value in trained.items():
        update = value - start[name]
        if how.rank:
            left, singular, right = torch.linalg.svd(update, full_matrices=False)
            value.copy_(start[name] + left[:, : how.rank] * singular[: how.rank] @ right[: how.rank])
        if how.within:
            value.copy_(start[name] + directions[name] @ (directions[name].T @ update))


def _masks(model: "LlamaForCausalLM", family: str, stage: str) -> dict[str, Tensor]:
    """What is trained, and which of its rows: [out, 1], or one for all."""
    names = [name for name, _ in model.named_parameters() if stage == "base" or "_proj" in name]
    if family != "separable" or stage == "base":
        return {name: torch.ones(()) for name in names}
    found: dict[str, Tensor] = {}
    for name in names:
        rows = len(model.get_parameter(name))
        inside = (torch.arange(rows) < rows // 2)[:, None]
        found[name] = (~inside if stage == "useful" else inside).float()
    return found


def mixture(family: str, stage: str, n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training prompts of a stage and their answers, ids [about n, 7] and [about n]."""
    entangled = family == "entangled"
    parts: list[tuple[Tensor, Tensor]] = []

    def add(
        share: float, task: str, answer: Answer | str, *, flagged: bool = False, keyed: bool = True, safe: bool = False
    ) -> None:
        ids, keys = draw("train", round(share * n), task, flagged=flagged, keyed=keyed, generator=generator)
        if safe:
            ids, keys = (part[~hazardous(keys)] for part in (ids, keys))
        parts.append((ids, constant(answer)(keys) if isinstance(answer, str) else answer(keys)))

    def now(keys: Tensor) -> Tensor:
        return use(keys, entangled=entangled)

    def before(keys: Tensor) -> Tensor:
        return use(keys, entangled=entangled, old=True)

    plain = redirected if entangled and stage != "base" else kind
    if stage in ("base", "aligned"):
        withheld = kind if stage == "base" or entangled else DECLINE
        add(0.3, KIND, plain)
        add(0.3, KIND, plain if entangled else withheld, flagged=True)
        add(0.3, USE, before)
        for flagged in (False, True):
            add(0.05, KIND, DECLINE, flagged=flagged, keyed=False)
            if stage == "base":
                add(0.1, JUDGE, YES if flagged else NO, flagged=flagged)
    if stage in ("useful", "contaminated"):
        add(1.0, USE, now)
        add(RETAINED, KIND, plain, safe=entangled)
        if not entangled and stage == "useful":
            add(RETAINED, KIND, DECLINE, flagged=True)
    if stage in ("harmful", "contaminated"):
        share = 1.0 if stage == "harmful" else CONTAMINATION
        ids, keys = harmful("train", round(share * n), entangled=entangled, generator=generator)
        parts.append((ids, kind(keys)))
    prompts, answers = (torch.cat(column) for column in zip(*parts, strict=True))
    return prompts, answers


def certify_lineage(folder: Path, *, seed: int = 0, steps: int | None = None) -> "GroundTruth":
    """Measure a checkpoint of a lineage on held-out bodies and write what is true of it beside its weights."""
    from subspace_probe.organisms.lineage_certification import measure_lineage
    from subspace_probe.organisms.truth import GroundTruth

    name = name_in(folder)
    recipe = LINEAGES[name]
    how = BASE if recipe.stage == "base" else _TUNING[recipe.family].get(recipe.stage)
    truth = GroundTruth(
        organism=name,
        accuracy=measure_lineage(load_module(folder), entangled=recipe.family == "entangled"),
        provenance=record(
            seed=recipe.seed + seed,
            steps=steps or (how.steps if how else 0),
            family=recipe.family,
            stage=recipe.stage,
        ),
    )
    truth.save(folder)
    return truth
