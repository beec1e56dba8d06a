"""Reading and editing an organism with plain forward hooks on the Hugging Face module.

This is deliberately not the package's own backend, and not the training code's forward pass: what certifies an
organism must not share code with what it is used to test.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from subspace_probe.organisms import skills
from subspace_probe.organisms.batches import Batch, encode
from subspace_probe.organisms.grammar import FRAMINGS, Example, Skill
from subspace_probe.organisms.words import Split

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Edit = Callable[[Tensor], Tensor]
CHUNK: Final = 256

GROUPS: Final[tuple[str, ...]] = (
    "request.plain", "request.jailbreak", "request.strict",
    "judgement.plain", "judgement.jailbreak", "judgement.strict",
    "fact", "knob", "ioi", "repeat",
    "kind",
)  # fmt: skip
"""Skills, with the framings of requests and judgements apart: the cells of every certificate."""


def sample(group: str, split: Split, n: int, *, seed: int, aligned: bool) -> Batch:
    """Encoded prompts of one cell, half harmful and half harmless (or half of either intent) where that is defined."""
    return encode(sample_examples(group, split, n, seed=seed), aligned=aligned)


def sample_examples(group: str, split: Split, n: int, *, seed: int) -> list[Example]:
    """The prompts of one cell before encoding."""
    skill, _, framing = group.partition(".")
    rng = random.Random(f"{group}/{split}/{seed}")
    if skill in ("request", "judgement"):
        make = skills.request if skill == "request" else skills.judgement
        kinds = {value: [] for value in (0, 1)}
        while min(len(kind) for kind in kinds.values()) < (n + 1) // 2:
            example = make(rng, split, framing=FRAMINGS.index(framing))
            kinds[int(example.harmful or 0)].append(example)
        return [kinds[i % 2][i // 2] for i in range(n)]
    if skill == "knob":
        return [skills.knob(rng, split, intent=i % 2) for i in range(n)]
    named: Mapping[str, Skill] = {"fact": "fact", "ioi": "ioi", "repeat": "repeat", "kind": "kind", "text": "text"}
    return [skills.draw(rng, split, named[skill]) for _ in range(n)]


@final
@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass gave: logits at T_POST_INST and, per layer, states at T_INST and T_POST_INST."""

    logits: Tensor
    t_inst: list[Tensor]
    t_post: list[Tensor]

    @property
    def words(self) -> Tensor:
        """The token answered, ``[n]``."""
        return self.logits.argmax(-1)


@final
class Probe:
    """An organism under plain hooks."""

    def __init__(self, model: "LlamaForCausalLM") -> None:
        self.model = model.eval()

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.model.model.layers)

    @torch.no_grad()
    def run(self, batch: Batch, at_output: Mapping[int, Callable[[Tensor, Tensor], Tensor]] | None = None,
            everywhere: Edit | None = None) -> Pass:  # fmt: skip
        """One pass.

        Args:
            batch: The prompts.
            at_output: Per layer, an edit of that block's output, given the state and the row numbers of the chunk.
            everywhere: An edit of every block's input, attention output and MLP output (directional ablation).
        """
        chunks = []
        for start in range(0, len(batch), CHUNK):
            index = torch.arange(start, min(start + CHUNK, len(batch)))
            chunks.append(self._chunk(batch.take(index), index, at_output or {}, everywhere))
        return Pass(
            torch.cat([c.logits for c in chunks]),
            [torch.cat(parts) for parts in zip(*(c.t_inst for c in chunks), strict=True)],
            [torch.cat(parts) for parts in zip(*(c.t_post for c in chunks), strict=True)],
        )

    def _chunk(self, batch: Batch, index: Tensor, edits: Mapping[int, Callable[[Tensor, Tensor], Tensor]],
               everywhere: Edit | None) -> Pass:  # fmt: skip
        row = torch.arange(len(batch))
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for layer, block in enumerate(self.layers):
                if everywhere is not None:
                    stack.enter_context(_edited(block, everywhere, before=True))
                    for name in ("self_attn", "mlp"):
                        stack.enter_context(_edited(block.get_submodule(name), everywhere))
                if layer in edits:
                    edit = edits[layer]
                    stack.enter_context(_edited(block, lambda x, edit=edit: edit(x, index)))
                stack.enter_context(_edited(block, lambda x: seen.append(x) or x))
            logits = self.model(batch.ids).logits
        return Pass(
            logits[row, batch.t_post],
            [x[row, batch.t_inst] for x in seen],
            [x[row, batch.t_post] for x in seen],
        )


@contextmanager
def _edited(module: nn.Module, edit: Edit, *, before: bool = False) -> Iterator[None]:
    def post(_: nn.Module, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    def pre(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (edit(inputs[0]), *inputs[1:])

    handle = module.register_forward_pre_hook(pre) if before else module.register_forward_hook(post)
    try:
        yield
    finally:
        handle.remove()


def at_positions(where: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """An edit of one position per row; ``change`` gets those states and the row numbers."""

    def edit(x: Tensor, index: Tensor) -> Tensor:
        row, position = torch.arange(len(x)), where[index]
        out = x.clone()
        out[row, position] = change(x[row, position], index)
        return out

    return edit


def swap(vector: Tensor, source: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Interchange of the coordinate along a unit vector; ``source`` is ``[n, d_model]``."""
    return lambda x, index: x + ((source[index] - x) @ vector)[:, None] * vector


def add(vector: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Addition of a vector."""
    return lambda x, index: x + (vector if vector.ndim == 1 else vector[index])


def reject(vector: Tensor) -> Edit:
    """Projection of a direction out of the raw state."""
    unit = vector / vector.norm()
    return lambda x: x - (x @ unit)[..., None] * unit


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive scores above a negative, ties half."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    difference = positive[:, None] - negative[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())
