"""The capture engine: activations of the tokens asked for, and nothing else computed.

A pass ends at the deepest site, so the blocks above it and the unembedding never run. Selected tokens are gathered
inside the hooks, so no whole [batch, pos, d_model] is kept. Batches hold prompts of similar length, so little is spent
on pads; rows are in the order of the prompts all the same. One part of the rows is held besides what the sink holds.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.activations import Activations
from subspace_probe.core.captures import Part, Plan, Sink
from subspace_probe.core.errors import ConfigError, DataError, PositionError, ShapeError
from subspace_probe.core.keys import content_key
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Run
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.linalg.finite import all_finite

WINDOW = 1024
"""Prompts tokenised at a time; a part lies in one window."""
PART_BYTES = 64 * 2**20
"""Rows of a part, over all sites. A batch may make it larger."""


@final
@dataclass(frozen=True)
class Limits:
    """How large a batch may be.

    Args:
        tokens: pads included. Lower it when memory is short.
        prompts: at most so many; no limit by default.
    """

    tokens: int = 8192
    prompts: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or (self.prompts is not None and self.prompts < 1):
            raise ConfigError(
                f"Batches of {self.tokens} tokens and {self.prompts} prompts were asked for. Give at least one of each."
            )


@final
class Windows:
    """Prompts tokenised a window at a time; the last window is kept, so that each is tokenised once if there is one.

    Args:
        tokens: tokenises prompts.
        prompts: all of them.

    Raises:
        DataError: no prompts, or prompts that are tokenised in another way the second time.
    """

    def __init__(self, tokens: Callable[[Sequence[Prompt]], TokenBatch], prompts: Sequence[Prompt]) -> None:
        self.tokens = tokens
        self.prompts = prompts
        self._last: tuple[int, TokenBatch] | None = None
        self.keys: dict[int, str] = {}
        if not prompts:
            raise DataError("A capture of no prompts was asked for. Give at least one.")

    def __getitem__(self, index: int) -> TokenBatch:
        if self._last is None or self._last[0] != index:
            with _counted_from(index * WINDOW):
                batch = self.tokens(self.prompts[index * WINDOW : (index + 1) * WINDOW])
            batch = replace(batch, index=batch.index + index * WINDOW)
            key = content_key([batch.ids, batch.mask, batch.instruction])
            if self.keys.setdefault(index, key) != key:
                raise DataError(
                    "The prompts were tokenised twice, to different tokens. A chat template that writes the time does "
                    "that; give it a fixed one in template_kwargs."
                )
            self._last = index, batch
        return self._last[1]

    def __len__(self) -> int:
        return -(-len(self.prompts) // WINDOW)


def planned(
    windows: Windows, where: Where, row_bytes: int, limits: Limits
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], tuple[Part, ...]]:
    """The prompt and the position of every row, and the parts they are computed in.

    A part ends once it has `PART_BYTES` and fills a batch. So parts depend on the prompts before them and on the limits
    only, and a capture that is taken up again under the same limits computes the same.

    Raises:
        PositionError: no prompt has such a token.
    """
    rows, positions, parts = list[Tensor](), list[Tensor](), list[Part]()
    start = 0
    for index in range(len(windows)):
        batch, base = windows[index], index * WINDOW
        with _counted_from(base):
            selected = batch.select(where, batch.positions) & batch.mask
        row, column = selected.nonzero(as_tuple=True)
        rows.append(row + base)
        positions.append(batch.positions[row, column])
        counts: list[int] = selected.sum(-1).tolist()
        lengths: list[int] = batch.lengths.tolist()
        first = held = tokens = 0
        for i, count in enumerate(counts):
            held, tokens = held + count, tokens + lengths[i]
            full = held * row_bytes >= PART_BYTES and tokens >= limits.tokens
            if full or i + 1 == len(counts):
                parts.append(Part(base + first, base + i + 1, start, start + held))
                first, start, held, tokens = i + 1, start + held, 0, 0
    if not start:
        raise PositionError(f"No token of these prompts is {str(where)!r}, so there is nothing to capture.")
    return torch.cat(rows), torch.cat(positions), tuple(parts)


def record(
    plan: Plan, windows: Windows, run: Callable[[TokenBatch], Run], sink: Sink, limits: Limits, *, progress: bool
) -> Activations:
    """Compute the parts that the sink does not have yet.

    Args:
        run: one pass over some prompts that reads the sites of the plan at its tokens.
    """
    with sink.record(plan) as recording, torch.no_grad():
        missing = [(i, part) for i, part in enumerate(plan.parts) if not recording.has(i)]
        known = len(plan.contrast) - sum(part.after - part.first for _, part in missing)
        with tqdm(
            total=len(plan.contrast), initial=known, desc="capture", unit="prompt", disable=not progress, leave=False
        ) as bar:
            for i, part in missing:
                index, inside = divmod(part.first, WINDOW)
                batch = windows[index].rows(slice(inside, inside + part.after - part.first))
                recording.write(i, part, _rows(plan, part, batch, run, limits, bar.update))
        return recording.finish()


def _rows(
    plan: Plan,
    part: Part,
    batch: TokenBatch,
    run: Callable[[TokenBatch], Run],
    limits: Limits,
    advance: Callable[[int], Any],
) -> dict[Site, Tensor]:
    """The rows of one part, in the order of its prompts, where the model left them: on its device."""
    counts = torch.bincount(plan.prompt[part.start : part.stop] - part.first, minlength=batch.size)
    starts = counts.cumsum(0) - counts
    found: dict[Site, Tensor] = {}
    for chosen in batches(batch.lengths.tolist(), limits):
        reads = run(batch.rows(chosen)).reads
        places = torch.cat([torch.arange(int(counts[i])) + starts[i] for i in chosen])
        for site, states in reads.items():
            if site not in found:
                found[site] = states.new_empty(part.stop - part.start, states.shape[-1])
            found[site][places.to(states.device)] = states
            if not all_finite(states):
                raise ShapeError(
                    f"Activations at {site.short} are not finite in {str(states.dtype)[6:]}. Keep them as bfloat16 or "
                    "float32 (dtype=); if they are not finite in the model itself, load it in another dtype."
                )
        advance(len(chosen))
    return found


@contextmanager
def _counted_from(base: int) -> Generator[None]:
    """Errors about prompts of one window say so where it is not the first."""
    try:
        yield
    except (DataError, PositionError) as error:
        raise type(error)(f"{error} (Prompts are counted from number {base} on.)" if base else str(error)) from None


def batches(lengths: Sequence[int], limits: Limits) -> Iterator[list[int]]:
    """Rows in batches of similar length, within limits; the longest first, so memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        size = max(1, limits.tokens // lengths[order[start]])
        size = size if limits.prompts is None else min(size, limits.prompts)
        yield order[start : start + size]
        start += size
