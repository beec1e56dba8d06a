"""Random rows of activations that need not fit into memory, without end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subspace_probe.core.activations import Rows
from subspace_probe.core.errors import ShapeError
from subspace_probe.core.sites import Site
from subspace_probe.linalg.finite import all_finite

BLOCK_ROWS = 1024
"""Rows that are read at once. A constant: another one gives another order."""


@final
@dataclass(frozen=True, eq=False)
class RandomRows:
    """Batches of rows in random order, pass after pass over the data.

    Blocks are read in random order into a buffer, which is shuffled as a whole and given out; what is left over joins
    the next buffer. In one pass every row comes once. With `n` rows or more in the buffer the order is uniform.

    Args:
        rows: in memory or on disk; the order depends on `seed` and the sizes only.
        keep: which rows take part, shape [n].
        batch_size: rows a batch.
        buffer_rows: rows held in memory; rounded up to whole blocks.
        seed: of the order.
    """

    rows: Rows
    site: Site
    keep: Bool[Tensor, " n"]
    batch_size: int
    buffer_rows: int
    seed: int

    def __iter__(self) -> Iterator[Float[Tensor, "b d"]]:
        generator = torch.Generator().manual_seed(self.seed)
        rest = torch.empty(0, self.rows.width(self.site))
        while True:
            for pool in self._pools(generator):
                held = torch.cat([rest, pool])
                held = held[torch.randperm(len(held), generator=generator)]
                full = len(held) - len(held) % self.batch_size
                yield from held[:full].split(self.batch_size)
                rest = held[full:]

    def _pools(self, generator: torch.Generator) -> Iterator[Tensor]:
        starts = torch.arange(0, self.rows.n, BLOCK_ROWS)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for some in starts.split(max(1, -(-self.buffer_rows // BLOCK_ROWS))):
            yield torch.cat([self._block(int(start)) for start in some])

    def _block(self, start: int) -> Tensor:
        stop = min(start + BLOCK_ROWS, self.rows.n)
        block = self.rows.read(self.site, start, stop)
        if not all_finite(block):
            raise ShapeError(f"Rows {start} to {stop} at {self.site.short} hold non-finite values. Leave them out.")
        return block[self.keep[start:stop].to(block.device)].float().cpu()
