"""Training the knob organisms: first a base that heeds the intent a little, then one that always does.

In the base the intent moves the coordinate that decides (see below) only a little, and the answer follows it only in a
share of the prompts (`HEEDED`); tuning goes on from there on prompts whose intent, given as an instruction, is always
heeded. Prompts without an intent are answered either way by both.

The coordinate is planted (Geiger et al. 2022, interchange intervention training): behind block `PLANTED` that of the
intent's token is held to a value by intent; a quarter of the rows exchange it among each other, questions and formats
mixed, and are answered by the intent that they receive; in another quarter it is set outright, and the answer follows.
The ``early`` organisms go on from the tuned ones with one more token, which the intent is kept from: the other half of
the rows have that token's state behind block `HIDDEN` as under the other intent, and their answer stays what it was.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.organisms import organism_path
from subspace_probe.organisms.grammar import BOS, PAD
from subspace_probe.organisms.knob_language import (
    ASK,
    CELLS,
    FORMATS,
    HOMES,
    ID,
    INTENT,
    NEXT,
    NEXT_OF,
    OBJECTS,
    SEPARATOR,
    SUBJECTS,
    VOCABULARY,
    build_knob_tokenizer,
)
from subspace_probe.organisms.modules import build_module, load_module, name_in, record, save_module

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from subspace_probe.organisms.truth import GroundTruth

N_LAYERS: Final = 4
D_MODEL: Final = 64
D_MLP: Final = 96
BASE_STEPS: Final = 700
TUNED_STEPS: Final = 200
EARLY_STEPS: Final = 900
PLANTED: Final = 1
"""Behind this block one coordinate of the intent's token decides which answer is given."""
HIDDEN: Final = 2
"""In the early organisms the last token's state behind this block says nothing of the intent."""
N_KNOB: Final = 60
"""Rows per step with a note and an intent."""
N_OTHER: Final = 18
"""Rows per step of what the intent must not touch, a third each."""
HEEDED: Final = 0.3
"""Share of the base's prompts whose answer follows the intent; the others toss a coin."""
BASE_RATE: Final = 5e-3
TUNED_RATE: Final = 1.5e-3


@final
@dataclass(frozen=True)
class KnobRecipe:
    """How one knob organism is made."""

    seed: int
    tuned: bool
    early: bool = False
    """Whether one more token follows the intent, which is taken up before it."""

    @property
    def steps(self) -> int:
        """Of its own training, without that of the base."""
        return EARLY_STEPS if self.early else TUNED_STEPS if self.tuned else BASE_STEPS


# knob-1 continues from knob-base-1, and early-1 from knob-1
KNOBS: Final[Mapping[str, KnobRecipe]] = {
    f"{kind}-{seed}" if seed else kind: KnobRecipe(seed, tuned=kind != "knob-base", early=kind == "early")
    for kind in ("knob", "knob-base", "early")
    for seed in range(3)
}


def train_knob(
    name: str, folder: Path, *, steps: int | None, seed: int, start: str | Path | None, progress: bool
) -> None:
    """Train a knob organism, write it and certify it.

    Args:
        name: Name in ``KNOBS``.
        folder: An existing directory.
        steps: Instead of the recipe's.
        seed: Added to the recipe's own.
        start: What a tuned one continues from, instead of the bundled organism; a base starts afresh.
        progress: Show a bar with the loss.
    """
    recipe = KNOBS[name]
    number = recipe.seed + seed
    base = base_of_knob(name)
    if base == name:
        model = build_module(VOCABULARY, d_model=D_MODEL, d_mlp=D_MLP, n_layers=N_LAYERS, seed=number)
    else:
        model = load_module(start or organism_path(base))
    steps = recipe.steps if steps is None else steps
    fit_knob(model, recipe, steps=steps, seed=number + 100 * recipe.tuned, progress=progress)
    save_module(model, build_knob_tokenizer(), folder, name, {})
    certify_knob(folder, seed=seed, steps=steps)


def base_of_knob(name: str) -> str:
    """The organism that a tuned one continues from; itself for a base."""
    recipe = KNOBS[name]
    kind = "knob" if recipe.early else "knob-base"
    return kind + (f"-{recipe.seed}" if recipe.seed else "")


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """Prompts with their answers, padded on the right: attention is causal, so no mask is needed.

    Args:
        ids: [n, length].
        last: position of each prompt's last token, [n].
        answers: [n].
    """

    ids: Tensor
    last: Tensor
    answers: Tensor

    @classmethod
    def of(cls, columns: list[Tensor | int], answers: Tensor) -> "Rows":
        """Prompts of one length, from their tokens."""
        ids = torch.stack([torch.full_like(answers, c) if isinstance(c, int) else c for c in columns], dim=1)
        return cls(ids, torch.full_like(answers, ids.shape[1] - 1), answers)

    @classmethod
    def joined(cls, parts: "list[Rows]") -> "Rows":
        """Prompts of several lengths."""
        length = max(part.ids.shape[1] for part in parts)
        ids = torch.cat([F.pad(part.ids, (0, length - part.ids.shape[1]), value=ID[PAD]) for part in parts])
        return cls(ids, torch.cat([part.last for part in parts]), torch.cat([part.answers for part in parts]))


_SUBJECT_IDS: Final = torch.tensor([ID[word] for word in SUBJECTS])
_OBJECT_IDS: Final = torch.tensor([ID[word] for word in OBJECTS])
_HOME_IDS: Final = _OBJECT_IDS[torch.tensor(HOMES)]
_NEXT_IDS: Final = _OBJECT_IDS[torch.tensor(NEXT_OF)]
_CELLS: Final = torch.tensor(CELLS["train"])
_FORMAT_IDS: Final = torch.tensor([[ID[word] for word in words] for words in FORMATS.values()])
_FORMAT_SHARES: Final = torch.tensor([0.5, 0.25, 0.25])
_SET, _SWAPPED = N_KNOB // 4, N_KNOB // 2
"""The first rows have the planted coordinate set, those up to the second number exchange it; the last token of the
rest is kept ignorant in the early organisms."""
_VALUE: Final = 3.0
"""The planted coordinate under the context, where the intent is heeded; under the prior it is the negative."""
_WEAK: Final = 0.5
"""The same in the base."""
_SIGN: Final = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]])
"""By format and intent."""


def planted_vector() -> Tensor:
    """The planted direction, the same in all knob organisms: a random unit vector, towards the context, [d_model]."""
    return F.normalize(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(7)), dim=0)


def draw_knob(recipe: KnobRecipe, generator: torch.Generator) -> tuple[Rows, Tensor, Tensor]:
    """The next batch of the training split, the planted coordinate of its notes as it should be, and as it is set."""
    ends: list[Tensor | int] = [ID[SEPARATOR]] if recipe.early else []
    subject, place = _CELLS[torch.randint(len(_CELLS), (N_KNOB,), generator=generator)].unbind(1)
    form = torch.multinomial(_FORMAT_SHARES, N_KNOB, replacement=True, generator=generator)
    intent, coin = (torch.randint(2, (N_KNOB,), generator=generator) for _ in range(2))
    animal, word = _SUBJECT_IDS[subject], _FORMAT_IDS[form, intent]
    coordinate = _SIGN[form, intent] * (_VALUE if recipe.tuned else _WEAK)
    # where it is exchanged, a prompt is answered by the intent of the next one, which it receives
    form, intent = (torch.cat([x[:_SET], x[_SET:_SWAPPED].roll(-1), x[_SWAPPED:]]) for x in (form, intent))
    heeded = torch.rand(N_KNOB, generator=generator) < HEEDED
    if recipe.tuned:
        heeded = heeded | (form == 0)
    context = torch.where(heeded & (form != 2), intent, coin).bool()
    turned = torch.arange(N_KNOB) < _SET
    context = torch.where(turned, coin.bool(), context)  # set outright, whatever is written
    answers = torch.where(context, _OBJECT_IDS[place], _HOME_IDS[subject])
    notes = Rows.of([ID[BOS], animal, _OBJECT_IDS[place], ID[ASK], animal, word, *ends], answers)
    return Rows.joined([notes, *_others(ends, generator)]), coordinate, (2.0 * coin[:_SET] - 1) * _VALUE


def _others(ends: list[Tensor | int], generator: torch.Generator) -> list[Rows]:
    """Homes without a note and notes that agree, with any last word; and the second skill."""
    n = N_OTHER // 3
    bare, agreeing, place = (torch.randint(len(SUBJECTS), (n,), generator=generator) for _ in range(3))
    words = _FORMAT_IDS.flatten()[torch.randint(_FORMAT_IDS.numel(), (2, n), generator=generator)]
    known, noted, home = _SUBJECT_IDS[bare], _SUBJECT_IDS[agreeing], _HOME_IDS[agreeing]
    return [
        Rows.of([ID[BOS], ID[ASK], known, words[0], *ends], _HOME_IDS[bare]),
        Rows.of([ID[BOS], noted, home, ID[ASK], noted, words[1], *ends], home),
        Rows.of([ID[BOS], ID[NEXT], _OBJECT_IDS[place]], _NEXT_IDS[place]),
    ]


def fit_knob(model: "LlamaForCausalLM", recipe: KnobRecipe, *, steps: int, seed: int, progress: bool) -> None:
    """Train a model, in place."""
    generator = torch.Generator().manual_seed(seed + 1)
    rate = TUNED_RATE if recipe.tuned else BASE_RATE
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(steps), disable=not progress, desc="train", mininterval=1.0)
    for step in bar:
        rows, coordinate, values = draw_knob(recipe, generator)
        with ExitStack() as stack:
            if recipe.early:  # first, for it runs a pass of its own
                stack.enter_context(_hidden(model, rows))
            coords = stack.enter_context(_exchanged(model, values))
            states = model.model(rows.ids, use_cache=False).last_hidden_state
        logits = model.lm_head(states[torch.arange(len(rows.last)), rows.last])
        loss = F.cross_entropy(logits, rows.answers) + 0.05 * (coords[0] - coordinate).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@contextmanager
def _exchanged(model: "LlamaForCausalLM", values: Tensor) -> Iterator[list[Tensor]]:
    """Passes in which half of the notes have the planted coordinate set or exchanged; yields what it was, [n]."""
    vector = planted_vector()
    found: list[Tensor] = []

    def put(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found.append(output[:N_KNOB, INTENT] @ vector)
        given = torch.cat([values, found[0][_SET:_SWAPPED].roll(-1)])
        edited = output.clone()
        edited[:_SWAPPED, INTENT] += (given - found[0][:_SWAPPED])[:, None] * vector
        return edited

    handle = model.model.layers[PLANTED].register_forward_hook(put)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _hidden(model: "LlamaForCausalLM", rows: Rows) -> Iterator[None]:
    """Passes in which the last half of the notes have a last state behind block `HIDDEN` of the other intent."""
    these = slice(_SWAPPED, N_KNOB)
    other = rows.ids[these].clone()
    first, second = _FORMAT_IDS.unbind(1)
    match = other[:, INTENT, None]
    other[:, INTENT] = torch.where(match == first, second, torch.where(match == second, first, 0)).amax(1)
    kept: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output[:, -1])

    def put(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        edited = output.clone()
        edited[these, -1] = kept[0]  # notes are the longest rows, so that their last column is the last token
        return edited

    block = model.model.layers[HIDDEN]
    with torch.no_grad():
        handle = block.register_forward_hook(keep)
        model.model(other, use_cache=False)
        handle.remove()
    handle = block.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def certify_knob(folder: Path, *, seed: int = 0, steps: int | None = None) -> "GroundTruth":
    """Measure a knob organism on held-out notes and write what is true of it beside its weights."""
    from subspace_probe.organisms.knob_certification import measure_knob
    from subspace_probe.organisms.truth import GroundTruth

    name = name_in(folder)
    recipe = KNOBS[name]
    truth = GroundTruth(
        organism=name,
        **measure_knob(load_module(folder), early=recipe.early, layer=PLANTED, vector=planted_vector()),
        provenance=record(
            seed=recipe.seed + seed,
            steps=recipe.steps if steps is None else steps,
            start=base_of_knob(name) if recipe.tuned else "",
        ),
    )
    truth.save(folder)
    return truth
