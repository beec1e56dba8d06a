"""What an intervention did to the states of its sites: on which tokens it acted, and how far it moved them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.edits import Edit, EditContext, Needs, needs_of
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Intervention
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where
from subspace_probe.models.capturing import Limits, batches
from subspace_probe.models.hooked import HookedModel


@final
@dataclass(frozen=True, eq=False)
class Fired:
    """The tokens that an edit of one site was to act on, prompt by prompt, in the order of their tokens.

    Attributes:
        before: their states in front of the edit, shape [rows, d], float32.
        change: what the edit added, shape [rows, d]; zero where a rule said no.
        prompt: which prompt each row belongs to.
        position: which of its tokens.
        n: number of prompts.
    """

    before: Float[Tensor, "rows d"]
    change: Float[Tensor, "rows d"]
    prompt: Int[Tensor, " rows"]
    position: Int[Tensor, " rows"]
    n: int

    @property
    def size(self) -> Float[Tensor, " rows"]:
        """Length of each move, in activation units."""
        return self.change.norm(dim=1)

    @property
    def moved(self) -> Tensor:
        """Which rows moved at all."""
        return self.size > 0

    @property
    def relative(self) -> float:
        """Median length of the moves, as a share of the state's norm; 0 where none moved."""
        share = (self.size / self.before.norm(dim=1).clamp(min=1e-12))[self.moved]
        return float(share.median()) if len(share) else 0.0

    def prompts_moved(self) -> float:
        """Share of prompts with a token that moved."""
        return len(self.prompt[self.moved].unique()) / self.n


@torch.no_grad()
def fire(model: HookedModel, intervention: Intervention, prompts: Sequence[Prompt]) -> Mapping[Site, Fired]:
    """Run the prompts under an intervention and watch each of its edits, in forward order.

    Later edits see what earlier ones did. Prompts without a token that is meant have no rows.

    Raises:
        SiteError: a site that is never computed.
    """
    batch, n_layers = model.tokens(prompts), model.spec.n_layers
    model.check(intervention)
    edits = intervention.edits(n_layers)
    last = max(edits, key=lambda site: site.order)
    watched = {site: _Watched(edit, intervention.where) for site, edit in edits.items()}
    for rows in batches(batch.lengths.tolist(), Limits()):
        model.run(batch.rows(rows), writes=watched, stop_after=last)
    return {site: watched[site].fired(batch.size) for site in sorted(watched, key=lambda site: site.order)}


@final
@dataclass(frozen=True, eq=False)
class _Watched:
    """An edit that keeps what it was given and what it made of it."""

    of: Edit
    where: Where
    kept: list[tuple[Tensor, ...]] = field(default_factory=list[tuple[Tensor, ...]])

    @property
    def needs(self) -> Needs:
        """What the edit reads."""
        return needs_of(self.of)

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        after = self.of(x, ctx)
        rows, columns = ctx.select(self.where).nonzero(as_tuple=True)
        before = x[rows, columns].float()
        found = (before, after[rows, columns].float() - before, ctx.batch.index[rows], ctx.positions[rows, columns])
        self.kept.append(tuple(tensor.cpu() for tensor in found))
        return after

    def fired(self, n: int) -> Fired:
        before, change, prompt, position = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        order = (prompt * (int(position.max()) + 1 if len(position) else 1) + position).argsort()
        return Fired(before[order], change[order], prompt[order], position[order], n)
