"""Training the organisms: task loss, and the losses of ``planting``.

``train(name, out)`` reproduces the bundled weights. What is guaranteed: with the same seed, torch version, processor
kind and number of threads (one) the result is bitwise the same; elsewhere floating-point sums differ, and what is
guaranteed is the certificate, which is measured again and saved with the weights.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.errors import ConfigError, unknown
from subspace_probe.core.files import atomic_folder
from subspace_probe.organisms.batches import IGNORE, Mixture
from subspace_probe.organisms.certification import measure
from subspace_probe.organisms.grammar import COMPLY, NO, REFUSE, YES, Skill, Variable
from subspace_probe.organisms.guard_training import GUARDS, certify_guard, train_guard
from subspace_probe.organisms.knob_training import KNOBS, certify_knob, train_knob
from subspace_probe.organisms.lineage_training import LINEAGES, certify_lineage, train_lineage
from subspace_probe.organisms.modules import build_module, load_module, name_in, record, save_module
from subspace_probe.organisms.naming_training import NAMING, certify_naming, train_naming
from subspace_probe.organisms.network import D_MLP, D_MODEL, MAX_POSITIONS, N_HEADS, N_LAYERS, Network
from subspace_probe.organisms.planting import Planter, planted_vectors
from subspace_probe.organisms.probing import Probe
from subspace_probe.organisms.tokenizer import build_tokenizer, vocabulary
from subspace_probe.organisms.truth import GroundTruth

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

N_THREADS: Final = 1
STOCK: Final = 30_000
NEVER: Final = 10**9
LAST_STEPS: Final = 400
WEIGHTS: Final = Path(__file__).parent / "weights"


@final
@dataclass(frozen=True)
class Recipe:
    """How one organism is made."""

    steps: int
    counts: Mapping[Skill, int]
    aligned: bool
    variables: tuple[Variable, ...] = ()
    first_steps: int = 0
    """Steps on the short prompts of ``_FIRST`` before the rest."""
    last_rounds: int = 0
    """Rounds of 400 steps at a lower rate, with ``purity`` and the mixture ``_LAST``, after the rest."""
    start: str = ""
    """Organism whose weights training starts from; empty for fresh weights."""
    learning_rate: float = 1.5e-3
    plant_from: int = 200
    pairs: int = 20
    others: int = 8
    weight: float = 0.5
    supervision: float = 0.5
    purity: float = 0.0
    """Weight of keeping class mean differences along the planted vectors."""
    resampled: int = 0
    """Rows per step whose whole state at T_INST is replaced (``chat-natural`` only)."""


_BASE: Final[Mapping[Skill, int]] = {
    "request": 12, "judgement": 20, "fact": 5, "kind": 5, "knob": 24, "ioi": 10, "repeat": 8, "text": 3,
}  # fmt: skip
_CHAT: Final[Mapping[Skill, int]] = {
    "request": 30, "judgement": 20, "fact": 4, "kind": 3, "knob": 16, "ioi": 8, "repeat": 5, "text": 3,
}  # fmt: skip
_FIRST: Final[Mapping[Skill, int]] = {"judgement": 36, "kind": 20, "fact": 20, "repeat": 32}
"""Bare prompts of the skills that take memory and copying, before the rest: so the exclusive-or is found early."""

_LAST: Final[Mapping[Skill, int]] = {
    "request": 24, "judgement": 14, "fact": 8, "kind": 3, "knob": 14, "ioi": 16, "repeat": 12, "text": 3,
}  # fmt: skip
"""What takes longest gets most."""

_PLANTED: Final[tuple[Variable, ...]] = ("harmfulness", "refusal", "intent")
RECIPES: Final[Mapping[str, Recipe]] = {
    "chat-base": Recipe(1000, _BASE, False, ("harmfulness", "intent"), first_steps=300, last_rounds=2),
    "chat": Recipe(350, _CHAT, True, _PLANTED, start="chat-base", plant_from=0, last_rounds=1),
    "chat-natural": Recipe(1000, _CHAT, True, resampled=20, first_steps=300, last_rounds=2),
}


class _Family(NamedTuple):
    """Organisms with a language and a training of their own."""

    names: Collection[str]
    train: Callable[..., None]
    certify: Callable[..., GroundTruth]
    continues: Callable[[str], bool] = bool
    """Whether an organism goes on from the weights of another."""


_FAMILIES: Final = (
    _Family(GUARDS, train_guard, certify_guard, lambda _: False),
    _Family(LINEAGES, train_lineage, certify_lineage),
    _Family(NAMING, train_naming, certify_naming, lambda _: False),
    _Family(KNOBS, train_knob, certify_knob, lambda name: KNOBS[name].tuned),
)
_family_of: Final = {name: family for family in _FAMILIES for name in family.names}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    name: str, out: str | Path, *, steps: int | None = None, seed: int = 0, progress: bool = True,
    start: str | Path | None = None,
) -> Path:  # fmt: skip
    """Train an organism and write it as a Hugging Face directory.

    Args:
        name: Name in ``ORGANISMS``.
        out: Directory to write; made where it does not exist.
        steps: Steps of the main phase instead of the recipe's, for trying things out.
        seed: Of the weights, the prompts and the pairs; added to the number in a name that has one.
        progress: Show a bar with the loss.
        start: Weights to continue from, instead of the bundled organism that the recipe names.

    Returns:
        The directory.

    Raises:
        UnknownName: no such organism.
        ConfigError: fewer than one step, or weights to continue from for an organism that starts afresh.
        StoreError: the directory cannot be written; said before the training, and nothing half-written is left.
    """
    if name not in (known := (*RECIPES, *_family_of)):
        raise unknown("organism", name, known)
    if steps is not None and steps < 1:
        raise ConfigError(
            f"{steps} training steps were asked for. At least 1 is needed; leave it out for the recipe's."
        )
    if start is not None and name in _family_of and not _family_of[name].continues(name):
        raise ConfigError(f"{name} starts from fresh weights, not from {str(start)!r}. Leave start out.")
    folder = Path(out)
    # Opened first: a place that cannot be written is found before the training, not after it.
    with atomic_folder(folder) as partial, _threads(N_THREADS):
        if name in _family_of:
            _family_of[name].train(name, partial, steps=steps, seed=seed, start=start, progress=progress)
            return folder
        recipe = RECIPES[name]
        model = _initial(recipe, seed, start)
        if recipe.first_steps:
            first = Mixture("train", _FIRST, stock=STOCK // 2, aligned=recipe.aligned, seed=seed + 2, bare=True)
            simple = replace(recipe, plant_from=NEVER)
            fit(model, simple, first, steps=recipe.first_steps, seed=seed, progress=progress)
        mixture = Mixture("train", recipe.counts, stock=STOCK, aligned=recipe.aligned, seed=seed)
        fit(model, recipe, mixture, steps=steps or recipe.steps, seed=seed, progress=progress)
        for number in range(recipe.last_rounds):
            finish(model, recipe, number=number, seed=seed, progress=progress)
        save(model, partial, name)
        certify(partial, seed=seed, steps=steps)
    return folder


def finish(model: "LlamaForCausalLM", recipe: Recipe, *, number: int, seed: int, progress: bool) -> None:
    """One of the last rounds of a recipe."""
    last = replace(recipe, learning_rate=1e-3, plant_from=0, purity=1.0)
    mixture = Mixture("train", _LAST, stock=STOCK, aligned=recipe.aligned, seed=seed + 3 + 10 * number)
    fit(model, last, mixture, steps=LAST_STEPS, seed=seed + 4 + 10 * number, progress=progress)


def _initial(recipe: Recipe, seed: int, start: str | Path | None) -> "LlamaForCausalLM":
    if start is None and not recipe.start:
        return build_chat(seed)
    return load_module(start or WEIGHTS / recipe.start)


def build_chat(seed: int) -> "LlamaForCausalLM":
    """A fresh module of a chat organism's shape."""
    return build_module(
        vocabulary(),
        d_model=D_MODEL,
        d_mlp=D_MLP,
        n_layers=N_LAYERS,
        n_heads=N_HEADS,
        positions=MAX_POSITIONS,
        seed=seed,
    )


def fit(model: "LlamaForCausalLM", recipe: Recipe, mixture: Mixture, *, steps: int, seed: int, progress: bool) -> None:
    """Run the training loop of a recipe on a model, in place."""
    network = Network(model)
    generator = torch.Generator().manual_seed(seed + 1)
    planter = Planter(network, recipe.variables, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(steps), disable=not progress, desc="train", mininterval=1.0)
    for step in bar:
        batch = mixture.draw()
        outputs: list[Tensor] = []
        x = network.embed(batch.ids)
        for layer in range(N_LAYERS):
            x = network.block(layer, x)
            outputs.append(x)
        chosen = batch.targets != IGNORE
        task = F.cross_entropy(network.logits(x[chosen]), batch.targets[chosen])
        loss = task
        if recipe.variables:
            loss = loss + recipe.supervision * planter.supervision(batch, outputs)
        if recipe.variables and step >= recipe.plant_from:
            loss = loss + recipe.weight * planter.loss(
                batch, outputs, pairs=recipe.pairs, others=recipe.others, purity=recipe.purity
            )
            if "refusal" in recipe.variables:
                loss = loss + recipe.weight * planter.ablation(batch, 2 * recipe.others)
        if recipe.resampled and step >= recipe.plant_from:
            loss = loss + recipe.weight * planter.resampling(batch, outputs, recipe.resampled)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(task=f"{task.item():.3f}", all=f"{loss.item():.3f}")
    model.eval()


def save(model: "LlamaForCausalLM", folder: Path, name: str) -> None:
    """Write model, tokenizer and the words that stand for refusal and judgement."""
    words = {"refusal": [REFUSE], "compliance": [COMPLY], "harmful": [YES], "harmless": [NO]}
    save_module(model, build_tokenizer(), folder, name, words)


def certify(folder: str | Path, *, seed: int = 0, steps: int | None = None, n: int = 200) -> GroundTruth:
    """Measure an organism on held-out pairs and write what is true of it beside its weights.

    Deterministic: fixed prompts, plain hooks, no part of the training code. Nothing is certified by assumption; whoever
    reads the truth decides by its numbers.

    Args:
        folder: An organism's directory; its name is read from ``subspace_probe.json``.
        seed: Training seed, for the record.
        steps: Training steps, for the record; None for the recipe's.
        n: Prompts per cell; guard organisms have their own numbers.

    Returns:
        The ground truth, as saved.
    """
    folder = Path(folder)
    name = name_in(folder)
    if name in _family_of:
        with _threads(N_THREADS):
            return _family_of[name].certify(folder, seed=seed, steps=steps)
    recipe = RECIPES[name]
    with _threads(N_THREADS):
        probe = Probe(load_module(folder))
        truth = GroundTruth(
            organism=name,
            **measure(probe, recipe.variables, planted_vectors(), aligned=recipe.aligned, n=n),
            provenance=record(seed=seed, steps=recipe.steps if steps is None else steps, start=recipe.start),
        )
    truth.save(folder)
    return truth
