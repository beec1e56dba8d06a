"""Random rows from a buffer: each once a pass, in an order that has nothing to do with theirs."""

from itertools import islice

import pytest
import torch

from tests.planted import activations


def _source(n: int, batch: int, buffer: int, seed: int = 0, keep: torch.Tensor | None = None):
    from subspace_probe.core.sites import Site
    from subspace_probe.dictionaries.shuffling import RandomRows

    acts = activations(torch.arange(n).float()[:, None], torch.arange(n) % 2)
    kept = torch.ones(n, dtype=torch.bool) if keep is None else keep
    return RandomRows(acts.rows, Site(0), kept, batch, buffer, seed)


@pytest.mark.parametrize("buffer", [1024, 4096, 100_000])
def test_every_row_once_a_pass(buffer: int) -> None:
    n, batch = 8192, 128
    keep = torch.arange(n) % 4 != 0
    batches = list(islice(_source(n, batch, buffer, keep=keep), 2 * 6144 // batch))
    assert all(len(rows) == batch for rows in batches)
    seen = torch.cat(batches).flatten().long()
    assert torch.equal(seen.bincount(minlength=n), 2 * keep.long())


def test_order_is_random_and_seeded() -> None:
    first, again, other = (next(iter(_source(8192, 512, 4096, seed))).flatten() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({int(row) // 1024 for row in first}) == 4  # of all blocks in the buffer
    assert abs(float(torch.corrcoef(torch.stack([first, torch.arange(512.0)]))[0, 1])) < 0.2


def test_rows_that_are_not_finite() -> None:
    from subspace_probe.core.errors import ShapeError

    source = _source(100, 10, 100)
    source.rows.read(source.site, 0, 100)[7] = float("inf")
    with pytest.raises(ShapeError, match="non-finite"):
        next(iter(source))
