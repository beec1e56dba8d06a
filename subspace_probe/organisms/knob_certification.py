"""Measuring a knob organism on notes it never saw: what it answers, and where exchanging whole states turns its answer.

Everything is deterministic: fixed prompts, bare forward hooks, no part of the training and of the library's patching.
"""

from typing import TYPE_CHECKING, Final, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST, at
from subspace_probe.organisms.grammar import BOS
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
)
from subspace_probe.organisms.truth import Planted

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

N_GAP: Final = 240
"""Notes of the training split that means are taken over."""


class Measured(TypedDict):
    """The fields of a ``GroundTruth`` that are measured."""

    variables: tuple[Planted, ...]
    accuracy: dict[str, float]
    behaviour: dict[str, dict[str, float]]


def measure_knob(model: "LlamaForCausalLM", *, early: bool, layer: int, vector: Tensor) -> Measured:
    """Everything about one knob organism, on all held-out notes.

    Args:
        early: whether a token follows the intent.
        layer: behind which the intent was planted.
        vector: along which, a unit vector [d_model].
    """
    behaviour = {"pair accuracy": {name: _pair_accuracy(model, name, early=early) for name in FORMATS}}
    for name, position in {"intent": INTENT, "last": -1}.items() if early else {"last": -1}.items():
        whole, along = {}, {}
        for number in range(len(model.model.layers)):
            gap = _gap(model, number, position, early)
            whole[f"layer {number}"] = _exchanged(model, number, position, early=early)
            along[f"layer {number}"] = _exchanged(model, number, position, early=early, along=gap)
        behaviour[f"{name} token, whole state of the same question"] = whole
        behaviour[f"{name} token, one direction of another question"] = along
    drawn = torch.randn(len(vector), generator=torch.Generator().manual_seed(8))
    turned, control = (
        _exchanged(model, layer, INTENT, early=early, along=unit) for unit in (vector, F.normalize(drawn, dim=0))
    )
    where = at(INTENT) if early else LAST
    n = 2 * len(CELLS["test"])
    planted = Planted("intent", Site(layer), where, vector, {"instruction": turned}, {"instruction": control}, n)
    return {"variables": (planted,), "accuracy": _accuracies(model, early=early), "behaviour": behaviour}


def _prompts(form: str, intent: int, *, early: bool, split: str = "test") -> tuple[Tensor, Tensor, Tensor]:
    """Every note of a split under one intent: ids, and the ids of its two answers, home first."""
    end = [ID[SEPARATOR]] if early else []
    word = ID[FORMATS[form][intent]]
    rows, answers = [], []
    for subject, place in CELLS[split] if split == "test" else CELLS[split][:: len(CELLS[split]) // N_GAP]:
        animal = ID[SUBJECTS[subject]]
        rows.append([ID[BOS], animal, ID[OBJECTS[place]], ID[ASK], animal, word, *end])
        answers.append([ID[OBJECTS[HOMES[subject]]], ID[OBJECTS[place]]])
    home, noted = torch.tensor(answers).unbind(1)
    return torch.tensor(rows), home, noted


def _pair_accuracy(model: "LlamaForCausalLM", form: str, *, early: bool) -> float:
    right = []
    for intent in (0, 1):
        ids, *answers = _prompts(form, intent, early=early)
        right.append(_answers(model, ids) == answers[intent])
    return _share(right[0] & right[1])


def _gap(model: "LlamaForCausalLM", layer: int, position: int, early: bool) -> Tensor:
    """Unit vector from the mean state under the prior to that under the context, on notes of the training split."""
    ends = [
        _states(model, _prompts("instruction", intent, early=early, split="train")[0], layer)[:, position].mean(dim=0)
        for intent in (0, 1)
    ]
    return F.normalize(ends[1] - ends[0], dim=0)


def _exchanged(
    model: "LlamaForCausalLM", layer: int, position: int, *, early: bool, along: Tensor | None = None
) -> float:
    """Share of prompts that answer their own question with the source's intent, over both directions.

    Args:
        along: a unit vector: the component along it is taken from a prompt of another question. Without it, the whole
            state is taken from the same question.
    """
    hits: list[Tensor] = []
    for intent in (0, 1):
        ids, *answers = _prompts("instruction", intent, early=early)
        sources, *_ = _prompts("instruction", 1 - intent, early=early)
        states = _states(model, sources, layer)[:, position]
        if along is not None:
            # a shift that is no multiple of the notes about one animal: another animal, and another place
            own = _states(model, ids, layer)[:, position]
            states = own + ((states.roll(101, dims=0) - own) @ along)[:, None] * along
        hits.append(_answers(model, ids, layer=layer, position=position, states=states) == answers[1 - intent])
    return _share(torch.cat(hits))


def _accuracies(model: "LlamaForCausalLM", *, early: bool) -> dict[str, float]:
    """Right answers where the intent should not matter."""
    end = [ID[SEPARATOR]] if early else []
    homes = torch.tensor([ID[OBJECTS[place]] for place in HOMES])
    out: dict[str, float] = {}
    for word in dict.fromkeys(word for words in FORMATS.values() for word in words):
        bare = torch.tensor([[ID[BOS], ID[ASK], ID[animal], ID[word], *end] for animal in SUBJECTS])
        noted = [
            [ID[BOS], ID[animal], int(home), ID[ASK], ID[animal], ID[word], *end]
            for animal, home in zip(SUBJECTS, homes, strict=True)
        ]
        out[f"no note, {word}"] = _share(_answers(model, bare) == homes)
        out[f"the note agrees, {word}"] = _share(_answers(model, torch.tensor(noted)) == homes)
    following = torch.tensor([[ID[BOS], ID[NEXT], ID[place]] for place in OBJECTS])
    wanted = torch.tensor([ID[OBJECTS[place]] for place in NEXT_OF])
    out["next place"] = _share(_answers(model, following) == wanted)
    return out


@torch.no_grad()
def _states(model: "LlamaForCausalLM", ids: Tensor, layer: int) -> Tensor:
    """Output of a block, [n, length, d_model]."""
    out: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        out.append(output)

    handle = model.model.layers[layer].register_forward_hook(keep)
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return out[0]


@torch.no_grad()
def _answers(
    model: "LlamaForCausalLM",
    ids: Tensor,
    *,
    layer: int | None = None,
    position: int = -1,
    states: Tensor | None = None,
) -> Tensor:
    """Likeliest next ids, [n]; with the given states, [n, d_model], as a block's output at one token."""
    if layer is None or states is None:
        return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1)

    def put(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        edited = output.clone()
        edited[:, position] = states
        return edited

    handle = model.model.layers[layer].register_forward_hook(put)
    try:
        return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1)
    finally:
        handle.remove()


def _share(hits: Tensor) -> float:
    """Mean of a boolean tensor as a float, rounded so that files compare."""
    return round(float(hits.double().mean()), 4)
