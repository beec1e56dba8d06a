"""Edits: pure functions on the activations of one site.

An edit is out of place and differentiable. It is called once per forward pass with the whole tensor of its site and
says itself which tokens it touches, so that several edits of one site, each with its own positions, compose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspace_probe.core.errors import SiteError
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
        reads: states of this very pass at the sites that edits need, [batch, pos, width]; filled as the pass goes.
        memory: what edits remember from the prompt while decoding, when its tokens are no longer seen.
    """

    batch: TokenBatch
    positions: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    step: int = 0
    reads: Mapping[Site, Tensor] = field(default_factory=dict[Site, Tensor])
    memory: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def select(self, where: Where) -> Bool[Tensor, "batch pos"]:
        """The real tokens of this pass that `where` means."""
        return self.batch.select(where, self.positions) & self.real

    def to(self, device: torch.device) -> "EditContext":
        """The same for activations on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("batch", "positions", "real")}
        return replace(self, **moved)


@runtime_checkable
class Edit(Protocol):
    """A pure, out-of-place, differentiable function of a site's activations."""

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]: ...


EditMap = Mapping[Site, Edit]
NO_EDITS: EditMap = {}

Needs = frozenset[tuple[Site, Where]]
"""Sites whose states an edit reads from `EditContext.reads`, and the tokens it reads there."""
NOTHING: Needs = frozenset()


def needs_of(edit: Edit | None) -> Needs:
    """What an edit reads of its own pass; nothing for plain functions."""
    return getattr(edit, "needs", NOTHING)


def needed_sites(writes: EditMap) -> frozenset[Site]:
    """The sites that edits read of their own pass.

    Raises:
        SiteError: one that is computed after the edit.
    """
    found: set[Site] = set()
    for site, edit in writes.items():
        for source, _ in needs_of(edit):
            if source.order > site.order:
                raise SiteError(
                    f"The edit at {site.short} depends on {source.short}, which is computed later. Let it depend on a "
                    "site no later than its own."
                )
            found.add(source)
    return frozenset(found)


Condition = Callable[[EditContext], Bool[Tensor, "batch pos"]]
"""Which tokens of a pass an edit may touch, besides its `where`."""


@final
@dataclass(frozen=True, eq=False)
class At:
    """Apply a function of states to the tokens of one `Where`, and leave all others untouched.

    Args:
        where: the tokens.
        change: takes the selected states [n, d] and, for each, which prompt of the call it belongs to [n]; returns
            [n, d].
        when: of these tokens, only those it says.
        needs: what `when` reads.
    """

    where: Where
    change: Callable[[Float[Tensor, "n d"], Int[Tensor, " n"]], Float[Tensor, "n d"]]
    when: Condition | None = None
    needs: Needs = NOTHING

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        selected = ctx.select(self.where)
        if self.when is not None:
            selected = selected & self.when(ctx)
        rows, columns = selected.nonzero(as_tuple=True)
        if rows.numel() == 0:
            return x
        if rows.numel() == selected.numel():  # no token is left alone: nothing to pick out and put back
            prompts = ctx.batch.index.repeat_interleave(x.shape[1])
            return self.change(x.flatten(0, 1), prompts).to(x.dtype).reshape(x.shape)
        changed = self.change(x[rows, columns], ctx.batch.index[rows])
        return x.index_put((rows, columns), changed.to(x.dtype))


@final
@dataclass(frozen=True, eq=False)
class Then:
    """Two edits of one site, one after the other."""

    first: Edit
    second: Edit

    @property
    def needs(self) -> Needs:
        """What either reads."""
        return needs_of(self.first) | needs_of(self.second)

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

    @property
    def needs(self) -> Needs:
        """What any copy reads."""
        return frozenset[tuple[Site, Where]]().union(*map(needs_of, self.edits))

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        n, batch = self.batch.size, self.batch.to(x.device)
        copies: list[Tensor] = []
        for i, edit in enumerate(self.edits):
            here = slice(i * n, (i + 1) * n)
            reads = {site: states[here] for site, states in ctx.reads.items()}
            memory = ctx.memory.setdefault(i, {})  # what one copy remembers is no other's
            part = EditContext(batch, ctx.positions[here], ctx.real[here], ctx.step, reads, memory)
            copies.append(x[here] if edit is None else edit(x[here], part))
        return torch.cat(copies)


def compose(*maps: EditMap) -> EditMap:
    """One edit map out of several; at a shared site they apply in the order given.

    Sites apply in the order of the forward pass, whatever the order given; `resid_post[l]` comes before its other name,
    `resid_pre[l + 1]`.
    """
    merged: dict[Site, Edit] = {}
    for edits in maps:
        for site, edit in edits.items():
            merged[site] = Then(merged[site], edit) if site in merged else edit
    return merged
