"""The engine of patching sweeps: the last token's logits when one token's state at one site is exchanged.

Every stream of a block but `resid_pre` acts on its own token only, since attention is done. So one pass of the block
with the patch written at all tokens at once gives the patched `resid_post` of each, and a cell of any stream is a state
in front of a block that replaces the recorded one: see `models.climbing`. Where a backend or family cannot be continued
so, and where the model is already edited, cells are passes from their block on, stacked on the batch axis.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import TokenBatch
from subspace_probe.models.climbing import Entry, Put, Recording, Records
from subspace_probe.models.hooked import HookedModel

FIXED = {"cpu": 32, "cuda": 1024}
"""Running a block at all costs about as much as so many tokens: its weights are read, its kernels started."""
LOGITS = 2**24
"""So many logits are computed at a time."""

Emit = Callable[[Tensor, Tensor], None]
"""Takes logits of the last token, shape [row, token], and the places they belong to, shape [row]."""


@final
@dataclass(frozen=True, eq=False)
class Cells:
    """Single tokens' states to be exchanged at one site; of one prompt no token twice.

    Attributes:
        prompts: row of the batch, shape [cell].
        columns: column of the batch, shape [cell].
        states: what is put there, shape [cell, width].
        places: where the results belong, shape [cell].
    """

    site: Site
    prompts: Int[Tensor, " cell"]
    columns: Int[Tensor, " cell"]
    states: Float[Tensor, "cell width"]
    places: Int[Tensor, " cell"]

    def __getitem__(self, index: Tensor) -> "Cells":
        return Cells(self.site, self.prompts[index], self.columns[index], self.states[index], self.places[index])

    def __len__(self) -> int:
        return len(self.prompts)


def exchanged(
    base: Float[Tensor, "*b width"], source: Float[Tensor, "*b width"], subspace: Subspace | None
) -> Float[Tensor, "*b width"]:
    """The source's state; with a subspace the base's, its component inside replaced by the source's."""
    if subspace is None:
        return source
    return base + (subspace.project(source) - subspace.project(base))


# ------------------------------------------------------------------------------------------------------ fast: climbing
def climb(
    model: HookedModel,
    recorder: Records,
    recording: Recording,
    cells: Sequence[Cells],
    tokens: Int[Tensor, " token"] | None,
    batch_tokens: int,
    emit: Emit,
) -> None:
    """Every cell as a continuation of one recorded pass.

    Args:
        recorder: the model's backend, which made the recording.
        tokens: compute the logits of these only.
        batch_tokens: how many tokens a block may run on at a time.
    """
    moved = [entered for layer in _layers(cells) for entered in _moved(model, recording, layer, batch_tokens)]
    layers = torch.cat([torch.full((len(some),), layer) for layer, some in moved])
    prompts, columns, states, places = (
        torch.cat([getattr(some, name) for _, some in moved]) for name in ("prompts", "columns", "states", "places")
    )
    # without kept keys and values every continuation begins at the first token
    starts = columns if recording.cached is not None else torch.zeros_like(columns)
    order = (starts * (model.spec.n_layers + 1) + layers).argsort(stable=True)
    at_once = max(1, LOGITS // (model.spec.d_vocab if tokens is None else len(tokens)))
    ends, done = list[Tensor](), list[Tensor]()
    fixed = FIXED.get(model.backend.device.type, FIXED["cuda"])
    for part in _ladders(starts[order].tolist(), recording.width, batch_tokens, fixed):
        rows = order[part]
        rows = rows[layers[rows].argsort(stable=True)]
        steps = [rows[layers[rows] == layer] for layer in layers[rows].unique()]
        entries = [Entry(int(layers[step[0]]), prompts[step], columns[step], states[step]) for step in steps]
        ends.append(recorder.climb(recording, entries))
        done.append(places[rows])
        if part.stop == len(order) or sum(map(len, ends)) >= at_once:
            for end, place in zip(torch.cat(ends).split(at_once), torch.cat(done).split(at_once), strict=True):
                emit(recorder.unembed(end, tokens), place)
            ends, done = [], []


def _ladders(starts: list[int], width: int, batch_tokens: int, fixed: int) -> Iterator[slice]:
    """Cells in ascending order of their first token, cut so that each part is run from its own first token on.

    Tokens of neighbouring columns share a part while the tokens that are run in vain cost less than another part.
    """
    begin = 0
    while begin < len(starts):
        most = begin + max(1, batch_tokens // (width - starts[begin]))
        end, in_vain = begin + 1, 0
        while end < min(most, len(starts)):
            in_vain = in_vain + starts[end] - starts[begin]
            if in_vain > fixed:
                end = starts.index(starts[end])  # not some of a column's rows here and the others elsewhere
                break
            end += 1
        yield slice(begin, end)
        begin = end


def _layers(cells: Sequence[Cells]) -> list[list[Cells]]:
    """Cells layer by layer."""
    layers = sorted({some.site.layer for some in cells})
    return [[some for some in cells if some.site.layer == layer] for layer in layers]


def _moved(
    model: HookedModel, recording: Recording, cells: Sequence[Cells], batch_tokens: int
) -> Iterator[tuple[int, Cells]]:
    """Cells of one layer as states in front of a block, and which block that is."""
    inside: list[Cells] = []
    for some in cells:
        if some.site.stream in ("resid_pre", "resid_post"):
            yield some.site.layer + (some.site.stream == "resid_post"), some
        else:
            inside.append(some)
    n, width = recording.batch.ids.shape
    at_once = max(1, batch_tokens // (n * width))
    for start in range(0, len(inside), at_once):
        yield from _through_block(model, recording, inside[start : start + at_once])


def _through_block(model: HookedModel, recording: Recording, cells: Sequence[Cells]) -> Iterator[tuple[int, Cells]]:
    """What patches inside one block, each on a copy of the batch, make of its `resid_post`."""
    layer = cells[0].site.layer
    rows = [some.prompts + copy * recording.batch.size for copy, some in enumerate(cells)]
    writes: dict[Site, Put] = {}
    for site in {some.site for some in cells}:
        here = [(at, some) for at, some in zip(rows, cells, strict=True) if some.site == site]
        columns, states = (torch.cat([getattr(some, name) for _, some in here]) for name in ("columns", "states"))
        writes[site] = Put(torch.cat([at for at, _ in here]), columns, states)
    above, prefix = Site(layer), recording.at(layer).repeat(len(cells))
    run = model.backend.run(prefix.batch, reads=[above], writes=writes, prefix=prefix, stop_after=above)
    for at, some in zip(rows, cells, strict=True):
        yield layer + 1, replace(some, states=run.reads[above][at, some.columns])


# ------------------------------------------------------------------------------------------- slow: passes on their own
def rerun(
    model: HookedModel,
    batch: TokenBatch,
    cells: Sequence[Cells],
    tokens: Int[Tensor, " token"] | None,
    batch_tokens: int,
    emit: Emit,
) -> None:
    """Every cell as a pass of its own from its block on, under whatever edits of the model stand."""
    n = batch.size
    for some in cells:
        site = some.site.lifted(model.spec.n_layers, model.standing_sites)
        prefix = model.prefix(batch, site.layer, column=int(some.columns.min()))
        at_once = max(1, batch_tokens // (n * prefix.hidden.shape[1]))
        copies = _rank(some.prompts)
        for start in range(0, int(copies.max()) + 1, at_once):
            here = some[(copies >= start) & (copies < start + at_once)]
            rows = here.prompts + n * _rank(here.prompts)
            stacked = prefix.repeat(int(rows.max()) // n + 1)
            put = Put(rows, here.columns, here.states)
            logits = model.run(stacked.batch, writes={site: put}, prefix=stacked, logits_to_keep=1).logits
            if logits is None:
                raise RuntimeError("a pass that was not stopped gave no logits")
            last = logits[rows.to(logits.device), -1]
            emit(last if tokens is None else last[:, tokens], here.places)


def _rank(prompts: Tensor) -> Tensor:
    """Of each cell, how many cells before it belong to the same prompt."""
    same = torch.nn.functional.one_hot(prompts)
    return same.cumsum(0).gather(1, prompts[:, None])[:, 0] - 1
