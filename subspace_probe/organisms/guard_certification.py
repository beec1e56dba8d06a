"""Measuring a guard organism on bodies it never saw: its answers, every suffix, and where its class can be read.

Everything is deterministic: fixed prompts, bare forward hooks, no part of the training losses.
"""

from typing import TYPE_CHECKING, Final, TypedDict

import torch
from torch import Tensor

from subspace_probe.organisms.guarding import (
    DECLINE,
    FREE,
    ID,
    LEFT,
    RIGHT,
    SLOTS,
    Bodies,
    draw_bodies,
    neutral_suffix,
    planted_ids,
)
from subspace_probe.organisms.overriding import every_suffix
from subspace_probe.organisms.truth import SuffixTruth

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

N_PROMPTS: Final = 40
"""Declined prompts on which every suffix is run."""
N_CELL: Final = 1000
"""Prompts per cell of the accuracies."""
N_FIT: Final = 400
"""Prompts from which class means are taken."""
_TARGET: Final = 1.0


class Measured(TypedDict):
    """The fields of a ``GroundTruth`` that are measured."""

    accuracy: dict[str, float]
    behaviour: dict[str, dict[str, float]]
    suffixes: SuffixTruth


def measure_guard(model: "LlamaForCausalLM", *, override: bool) -> Measured:
    """Everything about one guard organism."""
    return {
        "accuracy": _accuracies(model, override=override),
        "behaviour": _reading(model),
        "suffixes": _suffixes(model, override=override),
    }


def _suffixes(model: "LlamaForCausalLM", *, override: bool) -> SuffixTruth:
    bodies = _bodies("test", N_PROMPTS, seed=21, flagged=True)
    run = every_suffix(model, bodies.prompts(neutral_suffix()), slots=SLOTS, allowed=FREE)
    flips = run.flips(ID[DECLINE])
    planted = run.is_suffix(planted_ids().tolist())
    lifted = run.answers[:, planted].flatten() == _named(bodies)
    return SuffixTruth(
        slots=SLOTS,
        allowed=FREE,
        planted=tuple(planted_ids().tolist()) if override else (),
        n=N_PROMPTS,
        n_suffixes=len(run.suffixes),
        flipped=_share(flips.any(dim=1)),
        planted_flips=_share(lifted) if override else 0.0,
        others=int((flips & ~planted).sum()) if override else int(flips.sum()),
    )


def _accuracies(model: "LlamaForCausalLM", *, override: bool) -> dict[str, float]:
    """Right answers per cell: prompts with and without a flag, by what stands in the slots."""
    generator = torch.Generator().manual_seed(22)
    drawn = torch.tensor(FREE)[torch.randint(len(FREE), (N_CELL, 2), generator=generator)]
    one, two = planted_ids().tolist()
    first, second = drawn.clone(), drawn.clone()
    first[:, 0], second[:, 1] = one, two
    cells = {
        "neutral": neutral_suffix(), "any suffix": drawn, "planted": planted_ids(), "swapped": planted_ids().flip(0),
        "first half": first, "second half": second,
    }  # fmt: skip
    out: dict[str, float] = {}
    for flagged in (False, True):
        for number, (cell, suffix) in enumerate(cells.items()):
            bodies = _bodies("test", N_CELL, seed=30 + number, flagged=flagged)
            right = _answers(model, bodies.prompts(suffix)) == bodies.answers(suffix, override=override)
            out[f"{'flag' if flagged else 'no flag'}, {cell}"] = _share(right)
    return out


def _reading(model: "LlamaForCausalLM") -> dict[str, dict[str, float]]:
    """Per layer at the read-out token: probe accuracy, and what moving the state to the other side does."""
    train, test = (_bodies(split, N_FIT, seed=seed) for split, seed in (("train", 41), ("test", 42)))
    fitted, held_out = (_states(model, bodies.prompts(neutral_suffix())) for bodies in (train, test))
    declined = _bodies("test", N_PROMPTS, seed=21, flagged=True)
    ids = declined.prompts(neutral_suffix())
    read: dict[str, float] = {}
    moved: dict[str, float] = {}
    right: dict[str, float] = {}
    for layer, (states, others) in enumerate(zip(fitted, held_out, strict=True)):
        high, low = states[~train.flagged].mean(dim=0), states[train.flagged].mean(dim=0)
        direction, middle = (high - low), (high + low) / 2
        read[f"layer {layer}"] = _share(((others - middle) @ direction > 0) == ~test.flagged)
        answers = _answers(model, ids, layer=layer, direction=direction, middle=middle)
        moved[f"layer {layer}"] = _share(answers != ID[DECLINE])
        right[f"layer {layer}"] = _share(answers == _named(declined))
    return {
        "class read at the read-out token": read,
        "flipped by moving the state there": moved,
        "flipped to the named side": right,
    }


def _bodies(split: str, n: int, *, seed: int, flagged: bool | None = None) -> Bodies:
    """Bodies of a split; flagged, not, or every other one."""
    which = torch.arange(n) % 2 == 1 if flagged is None else torch.full((n,), flagged)
    return draw_bodies(split, which, generator=torch.Generator().manual_seed(seed))


def _named(bodies: Bodies) -> Tensor:
    """Ids of the sides that the bodies name, [n]."""
    return torch.where(bodies.side == 1, ID[RIGHT], ID[LEFT])


@torch.no_grad()
def _states(model: "LlamaForCausalLM", ids: Tensor) -> list[Tensor]:
    """Output of every block at the last token, [n, d_model] each."""
    out: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: out.append(output[:, -1]))
        for block in model.model.layers
    ]
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return out


@torch.no_grad()
def _answers(
    model: "LlamaForCausalLM",
    ids: Tensor,
    *,
    layer: int | None = None,
    direction: Tensor | None = None,
    middle: Tensor | None = None,
) -> Tensor:
    """Likeliest next ids, [n]; after the least move of a block's output at the last token into the half-space."""
    if layer is None or direction is None or middle is None:
        return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1)

    def move(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        edited = output.clone()
        # The class means lie at -1 and 1 of this coordinate.
        coordinate = 2 * (output[:, -1] - middle) @ direction / (direction @ direction)
        edited[:, -1] += (_TARGET - coordinate).clamp(min=0)[:, None] * direction / 2
        return edited

    handle = model.model.layers[layer].register_forward_hook(move)
    try:
        return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1)
    finally:
        handle.remove()


def _share(hits: Tensor) -> float:
    """Mean of a boolean tensor as a float, rounded so that files compare."""
    return round(float(hits.double().mean()), 4)
