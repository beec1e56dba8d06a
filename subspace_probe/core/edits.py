"""Edits: pure functions on the activations of one site.

An edit is out of place and differentiable. It is called once per forward pass with the whole tensor of its site and
says itself which tokens it touches, so that several edits of one site, each with its own positions, compose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import TokenBatch, Where


@final
@dataclass(frozen=True, eq=False)
class EditContext:
    """What an edit may know about the pass it is called in.

    Attributes:
        batch: the prompts of the pass.
        positions: absolute position of every token of this pass, shape [batch, pos]; a decoding step has one column.
        real: False at pads, shape [batch, pos].
        step: 0 for the prompt, i for the i-th decoding step.
    """

    batch: TokenBatch
    positions: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    step: int = 0

    def select(self, where: Where) -> Bool[Tensor, "batch pos"]:
        """The real tokens of this pass that `where` means."""
        return self.batch.select(where, self.positions) & self.real

    def to(self, device: torch.device) -> "EditContext":
        """The same for activations on another device."""
        return EditContext(self.batch.to(device), self.positions.to(device), self.real.to(device), self.step)


@runtime_checkable
class Edit(Protocol):
    """A pure, out-of-place, differentiable function of a site's activations."""

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]: ...


EditMap = Mapping[Site, Edit]
NO_EDITS: EditMap = {}


@final
@dataclass(frozen=True, eq=False)
class At:
    """Apply a function of states to the tokens of one `Where`, and leave all others untouched.

    Args:
        where: the tokens.
        change: takes the selected states [n, d] and the row of the batch each came from [n]; returns [n, d].
    """

    where: Where
    change: Callable[[Float[Tensor, "n d"], Int[Tensor, " n"]], Float[Tensor, "n d"]]

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        selected = ctx.select(self.where)
        rows, columns = selected.nonzero(as_tuple=True)
        if rows.numel() == 0:
            return x
        return x.index_put((rows, columns), self.change(x[rows, columns], rows).to(x.dtype))


@final
@dataclass(frozen=True, eq=False)
class Then:
    """Two edits of one site, one after the other."""

    first: Edit
    second: Edit

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        return self.second(self.first(x, ctx), ctx)


@final
@dataclass(frozen=True, eq=False)
class Stacked:
    """Several edits of one site, each on its own copy of the batch: copies are stacked on the batch axis.

    Args:
        edits: one a copy; None leaves its copy alone.
        batch: the prompts of one copy.
    """

    edits: Sequence[Edit | None]
    batch: TokenBatch

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        n = self.batch.size
        copies = [x[i * n : (i + 1) * n] for i in range(len(self.edits))]
        part = EditContext(self.batch.to(x.device), ctx.positions[:n], ctx.real[:n], ctx.step)
        return torch.cat([c if edit is None else edit(c, part) for c, edit in zip(copies, self.edits, strict=True)])


def compose(*maps: EditMap) -> EditMap:
    """One edit map out of several; at a shared site they apply in the order given."""
    merged: dict[Site, Edit] = {}
    for edits in maps:
        for site, edit in edits.items():
            merged[site] = Then(merged[site], edit) if site in merged else edit
    return merged
