"""Training the organisms ``ioi``: the answers, and the position of the repeated name planted where heads ask for it.

Interchange training (Geiger et al. 2022, arXiv:2112.00826): the coordinate along one random vector of the residual
stream behind block `LAYER`, at the last token, is exchanged between sentences, and the answer must become the name at
the source's position. So the last block's heads learn to ask by that coordinate which name to fetch.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST
from subspace_probe.organisms.modules import build_module, load_module, name_in, record, save_module
from subspace_probe.organisms.naming import (
    ID,
    QUESTIONS,
    VOCABULARY,
    build_naming_tokenizer,
    draw,
    ids,
    sentence,
)
from subspace_probe.organisms.truth import GroundTruth, Planted
from subspace_probe.organisms.words import Split

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

D_MODEL: Final = 64
LAYER: Final = 2
"""The block behind which the position is planted; one more block reads it."""
STEPS: Final = 720
N_SENTENCES: Final = 64
N_FACTS: Final = 32
PLANT_FROM: Final = 200
QUIET_FROM: Final = 320
"""Step from which the MLP behind which the position is planted must not write it."""
N_CERTIFIED: Final = 400
_LEARNING_RATE: Final = 5e-3
_PLANT_SEED: Final = 7
NAMING: Final = {"ioi": 0}
"""Organisms of this language, and the seed of each."""


@final
@dataclass(frozen=True, eq=False)
class Sentences:
    """Sentences as ids, right answers and what they would be for either position.

    Args:
        ids: [n, length].
        position: [n], 0 where the second name is repeated, 1 where the first is.
        names: [n, 2], ids of the two names; the answer at position x is names[x].
    """

    ids: Tensor
    position: Tensor
    names: Tensor

    @classmethod
    def drawn(cls, n: int, split: Split, rng: random.Random) -> "Sentences":
        """Random ones of a split."""
        texts: list[str] = []
        names: list[list[int]] = []
        position = [rng.randrange(2) for _ in range(n)]
        for value in position:
            two, wording, place, gift = draw(rng, split)
            texts.append(sentence(two, 1 - value, wording, place, gift))
            names.append([ID[name] for name in two])
        return cls(torch.tensor(ids(texts)), torch.tensor(position), torch.tensor(names))

    def answers(self, position: Tensor) -> Tensor:
        """Ids of the answers, were the position another, [n]."""
        return self.names.gather(1, position[:, None])[:, 0]


def facts() -> tuple[Tensor, Tensor]:
    """Every fact: ids [n, length] and answers [n]."""
    rows = [(text.format(c=country), answer) for text, known in QUESTIONS.items() for country, answer in known.items()]
    return torch.tensor(ids([text for text, _ in rows])), torch.tensor([ID[answer] for _, answer in rows])


def planted_vector() -> Tensor:
    """A random unit vector of the residual stream, always the same one."""
    drawn = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(_PLANT_SEED), dtype=torch.float64)
    return (drawn / drawn.norm()).float()


@contextmanager
def behind(model: "LlamaForCausalLM", moved: Tensor | None = None) -> Iterator[list[Tensor]]:
    """The states behind block `LAYER` at the last token, filled in by each forward pass; moved by so much, if at all.

    Args:
        moved: [n, d_model].
    """
    states: list[Tensor] = []

    def hook(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states.append(output[:, -1])
        return output if moved is None else torch.cat([output[:, :-1], output[:, -1:] + moved[:, None]], dim=1)

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    try:
        yield states
    finally:
        handle.remove()


@contextmanager
def written(model: "LlamaForCausalLM") -> Iterator[list[Tensor]]:
    """What the MLP of block `LAYER` writes at the last token, filled in by each forward pass."""
    outputs: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output[:, -1])

    block: Any = model.model.layers[LAYER]
    handle = block.mlp.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def last(model: "LlamaForCausalLM", inputs: Tensor) -> Tensor:
    """Logits of the last token, [n, vocabulary]."""
    return model(inputs, use_cache=False, logits_to_keep=1).logits[:, -1]


def fit_naming(model: "LlamaForCausalLM", *, steps: int, seed: int, progress: bool) -> None:
    """Run the training loop on a model, in place."""
    rng, vector = random.Random(seed), planted_vector()
    asked, known = facts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps * 5 // 4, pct_start=0.1)
    model.train()
    bar = tqdm(range(steps), disable=not progress, desc="train", mininterval=1.0)
    for step in bar:
        batch = Sentences.drawn(N_SENTENCES, "train", rng)
        with behind(model) as states, written(model) as outputs:
            task = F.cross_entropy(last(model, batch.ids), batch.answers(batch.position))
        some = rng.sample(range(len(known)), N_FACTS)
        remembered = F.cross_entropy(last(model, asked[some]), known[some])
        coordinate, own = states[0] @ vector, outputs[0] @ vector
        # named first: an interchange of a coordinate that means nothing stays on a plateau
        loss = task + remembered + F.softplus(-2 * (2.0 * batch.position - 1) * coordinate).mean()
        if step >= PLANT_FROM:
            loss = loss + _interchange(model, batch, coordinate, vector)
        if step >= QUIET_FROM:
            # an MLP that leaves the coordinate to attention is one that can host an illusion of it
            attended = F.softplus(-2 * (2.0 * batch.position - 1) * (coordinate - own)).mean()
            loss = loss + attended + min(1.0, (step - QUIET_FROM) / 100) * own.var()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(ioi=f"{task.item():.3f}", facts=f"{remembered.item():.3f}", all=f"{loss.item():.3f}")
    model.eval()


def _interchange(model: "LlamaForCausalLM", batch: Sentences, coordinate: Tensor, vector: Tensor) -> Tensor:
    """Each sentence is given the coordinate of another one of the batch."""
    source = torch.arange(len(batch.ids)).roll(1)
    with behind(model, (coordinate[source] - coordinate)[:, None] * vector):
        return F.cross_entropy(last(model, batch.ids), batch.answers(batch.position[source]))


def train_naming(name: str, folder: Path, *, steps: int | None, seed: int, progress: bool, start: None = None) -> None:
    """Train an organism of this language, write it and certify it.

    Args:
        name: Name in ``NAMING``.
        folder: An existing directory.
        steps: Instead of the recipe's.
        seed: Added to the organism's own.
        progress: Show a bar with the loss.
        start: There is nothing to continue from.
    """
    number = NAMING[name] + seed
    model = build_module(
        VOCABULARY, d_model=D_MODEL, d_mlp=2 * D_MODEL, n_layers=LAYER + 2, attention="sdpa", seed=number
    )
    fit_naming(model, steps=STEPS if steps is None else steps, seed=number, progress=progress)
    save_module(model, build_naming_tokenizer(), folder, name, {})
    certify_naming(folder, seed=seed, steps=steps)


def certify_naming(folder: Path, *, seed: int = 0, steps: int | None = None) -> GroundTruth:
    """Measure an organism on held-out names and write what is true of it beside its weights."""
    name, model = name_in(folder), load_module(folder)
    vector, other = planted_vector(), torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    found, control = (exchanged(model, v / v.norm()) for v in (vector, other))
    asked, known = facts()
    with torch.no_grad():
        remembered = (last(model, asked).argmax(-1) == known).double().mean()
    truth = GroundTruth(
        organism=name,
        variables=(Planted("position", Site(LAYER), LAST, vector, found, control, N_CERTIFIED),),
        accuracy={"ioi": found["unchanged"], "facts": round(float(remembered), 4)},
        provenance=record(seed=NAMING[name] + seed, steps=STEPS if steps is None else steps, start=""),
    )
    truth.save(folder)
    return truth


@torch.no_grad()
def exchanged(model: "LlamaForCausalLM", vector: Tensor) -> dict[str, float]:
    """Share of held-out sentences that answer as the causal model does, over the whole vocabulary.

    Returns:
        `moved`: given the coordinate of a sentence of the other position. `kept`: of one of the same position.
        `unchanged`: as they are.
    """
    batch, rng = Sentences.drawn(N_CERTIFIED, "test", random.Random(21)), random.Random(22)
    with behind(model) as states:
        plain = last(model, batch.ids).argmax(-1)
    coordinate = states[0] @ vector
    shares = {"unchanged": (plain == batch.answers(batch.position)).double().mean()}
    for cell, other in (("moved", 1), ("kept", 0)):
        sources = [
            rng.choice(((batch.position == (value ^ other)).nonzero().flatten()).tolist())
            for value in batch.position.tolist()
        ]
        with behind(model, (coordinate[sources] - coordinate)[:, None] * vector):
            answers = last(model, batch.ids).argmax(-1)
        shares[cell] = (answers == batch.answers(batch.position[sources])).double().mean()
    return {cell: round(float(share), 4) for cell, share in shares.items()}
