"""Patching: put other states, or their component in a subspace, in the place of a model's own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspace_probe.core.edits import EditContext, EditMap
from subspace_probe.core.errors import ConfigError, DataError, PositionError
from subspace_probe.core.protocols import Part
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST, PROMPT, TokenBatch, Where
from subspace_probe.interventions.sources import Source

Align = Literal["start", "end", "repeat"]


@final
@dataclass(frozen=True, eq=False)
class Patch:
    """Activation patching: x + P (s - x), s the source's state; without a subspace, x becomes s (Geiger et al. 2021).

    Denoising puts states of clean prompts into corrupt ones, noising the other way round; which is which is in what
    the source was captured from and which prompts are run. Generated tokens are not patched, except by a stated value.

    Args:
        source: the states; `Source.of(acts)`, `.mean(acts)`, `.value(site, state)`, `.resampled(acts)`.
        where: which tokens of the prompts that are run.
        subspace: exchange the component in it alone.
        outside: exchange the component outside of it instead (the complement).
        align: which token gets which row where a prompt and its source have several, in different numbers: "start"
            pairs the first with the first, "end" the last with the last, and tokens left over stay as they are.
            "repeat" gives the one row of each prompt to all its tokens. Without it, numbers must be equal.
    """

    source: Source
    where: Where = LAST
    subspace: Subspace | None = None
    outside: bool = False
    align: Align | None = None

    def __post_init__(self) -> None:
        if self.outside and self.subspace is None:
            raise ConfigError("The component outside of no subspace was asked for. Give a subspace, or outside=False.")
        if self.align not in (None, "start", "end", "repeat"):
            raise ConfigError(f"align={self.align!r} was given. Give 'start', 'end' or 'repeat', or leave it out.")
        if self.subspace is not None:
            self.subspace.require_projection("patched along its basis alone")

    def edits(self, n_layers: int) -> EditMap:
        """One edit at every site of the source."""
        return {site: _Put(self, states) for site, states in self.source.resolve(n_layers).states.items()}

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """The states and the subspace, at every site."""
        source = self.source.resolve(n_layers)
        used: list[Part] = [source] if self.subspace is None else [source, self.subspace]
        return [(site, part) for site in source.states for part in used]

    def with_subspace(self, subspace: Subspace) -> "Patch":
        """The same exchange within another subspace."""
        return replace(self, subspace=subspace)

    def __repr__(self) -> str:
        inside = "" if self.subspace is None else f", {'outside' if self.outside else 'inside'} {self.subspace!r}"
        return f"Patch({self.source!r}, {self.where}{inside})"


@final
@dataclass(frozen=True, eq=False)
class _Put:
    """The edit of one site: finds each token's row, and exchanges."""

    of: Patch
    states: Float[Tensor, "rows width"]

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        row = _rows(self.of, ctx)
        batch, columns = (ctx.select(self.of.where) & (row >= 0)).nonzero(as_tuple=True)
        if not batch.numel():
            return x
        change = self.states.to(x.device)[row[batch, columns]] - x[batch, columns]
        if self.of.subspace is not None:
            # in float32 at least, and rounded once
            basis = self.of.subspace.basis.to(x.device, torch.promote_types(x.dtype, torch.float32))
            inside = (change.to(basis) @ basis.T) @ basis
            change = change.to(basis) - inside if self.of.outside else inside
        return x.index_put((batch, columns), (x[batch, columns] + change).to(x.dtype))


def _rows(patch: Patch, ctx: EditContext) -> Int[Tensor, "batch pos"]:
    """The source's row for every token of this pass, -1 where it has none.

    Raises:
        DataError: no states for a prompt of the call.
        PositionError: numbers of tokens that differ, without a word on how they are aligned.
    """
    prompt, batch = patch.source.prompt, ctx.batch
    if prompt is None:
        return torch.zeros_like(ctx.positions)
    counts = torch.bincount(prompt.to(ctx.positions.device), minlength=patch.source.n or 0)
    if int(batch.index.max()) >= len(counts):
        raise DataError(
            f"The source holds states for prompts 0 to {len(counts) - 1}, but the call has a prompt number "
            f"{int(batch.index.max())}. Capture one source a prompt, in the order of the prompts."
        )
    have, start = counts[batch.index], (counts.cumsum(0) - counts)[batch.index]
    tokens = batch.select(patch.where, batch.positions) & batch.select(PROMPT, batch.positions) & batch.mask
    wanted = tokens.sum(-1)
    if patch.align == "repeat":
        _require(have == 1, patch, batch, have, wanted, "only one state can be repeated")
        return torch.where(batch.select(PROMPT, ctx.positions), start[:, None], -1)
    if patch.align is None:
        _require(have == wanted, patch, batch, have, wanted, "say which token gets which: align='start' or 'end'")
    first = batch.positions.masked_fill(~tokens, batch.positions.shape[1]).amin(-1)
    offset = ctx.positions - first[:, None]
    if patch.align == "end":
        offset = offset + (have - wanted)[:, None]
    # a source may be longer than the prompt, whose generated tokens it is not for
    inside = (offset >= 0) & (offset < have[:, None]) & batch.select(PROMPT, ctx.positions)
    return torch.where(inside, start[:, None] + offset, -1)


def _require(
    good: Bool[Tensor, " batch"],
    patch: Patch,
    batch: TokenBatch,
    have: Int[Tensor, " batch"],
    wanted: Int[Tensor, " batch"],
    hint: str,
) -> None:
    if not bool(good.all()):
        row = int((~good).nonzero()[0, 0])
        raise PositionError(
            f"Prompt {int(batch.index[row])} has {int(wanted[row])} tokens at {str(patch.where)!r}, but its source has "
            f"{int(have[row])} (taken at {str(patch.source.where)!r}): {hint}. The prompt is: {batch.texts[row]!r}"
        )
