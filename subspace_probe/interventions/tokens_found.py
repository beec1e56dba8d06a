"""What a token search found, and what it had found on the way there: one search says what smaller budgets give."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspace_probe.core.tokens import TokenBatch
from subspace_probe.interventions.objectives import replaced

Ids = tuple[int, ...]


@final
@dataclass(frozen=True)
class Progress:
    """The best tokens a search had for one prompt once it had been run on so many rows.

    Attributes:
        rows: rows so far, gradients included.
        gradients: those of them that were differentiated.
        ids: one a free position.
    """

    rows: int
    gradients: int
    ids: Ids


@final
@dataclass(frozen=True, eq=False)
class TokensFound:
    """What a token search found, a row a prompt.

    Attributes:
        ids: the best tokens for the free positions, shape [n, slot].
        positions: those positions, absolute, shape [n, slot].
        loss: of these ids, shape [n]; 0 where every target is met.
        initial: of the prompt as it came, shape [n].
        rows: rows the model was run on, gradients included, shape [n].
        gradients: those of them that were differentiated, shape [n].
        found_at: how many rows it had taken when `ids` were first evaluated, shape [n].
        layer_forwards: blocks that rows went through in all; a gradient counts as three passes.
        depth: blocks that one row goes through.
        trail: for each prompt the tokens it came with and every improvement on them, in order.
    """

    ids: Int[Tensor, "n slot"]
    positions: Int[Tensor, "n slot"]
    loss: Float[Tensor, " n"]
    initial: Float[Tensor, " n"]
    rows: Int[Tensor, " n"]
    gradients: Int[Tensor, " n"]
    found_at: Int[Tensor, " n"]
    layer_forwards: int
    depth: int
    trail: tuple[tuple[Progress, ...], ...]

    @property
    def met(self) -> Bool[Tensor, " n"]:
        """Where the loss is 0."""
        return self.loss <= 0

    def within(self, *, rows: int | None = None, layer_forwards: int | None = None) -> Int[Tensor, "n slot"]:
        """What the search had when a smaller budget was used up: the tokens as they came, or its last improvement.

        Args:
            rows: that the model may have been run on for each prompt.
            layer_forwards: blocks that these rows may have gone through; a gradient counts as three passes.
        """
        most, deepest = (math.inf if limit is None else limit for limit in (rows, layer_forwards))
        best: list[Ids] = []
        for steps in self.trail:
            afford = [
                step for step in steps if step.rows <= most and self.depth * (step.rows + 2 * step.gradients) <= deepest
            ]
            best.append((afford or [steps[0]])[-1].ids)
        return torch.tensor(best)

    def put(self, batch: TokenBatch) -> TokenBatch:
        """The prompts with these ids in."""
        return replaced(batch, self.positions, self.ids)
