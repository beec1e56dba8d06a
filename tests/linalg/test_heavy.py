"""Heavy rows against their definition on whole data."""

import pytest
import torch

from subspace_probe.linalg.heavy import heavy_rows


def test_heavy_rows_are_those_of_the_definition_however_they_are_batched() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 20, generator=generator) * (1.2 * torch.randn(500, 1, generator=generator)).exp()
    squares = x.double().square().sum(1)
    expected = (squares >= squares.sum() / 20).nonzero().flatten().tolist()
    assert 0 < len(expected) < 20
    for size in (1, 33, 500):
        assert heavy_rows(x.split(size)).tolist() == expected
    assert heavy_rows((1e-30 * x).split(33)).tolist() == expected  # squares below float32
    assert heavy_rows((1e25 * x).split(33)).tolist() == expected  # and above
    assert heavy_rows([torch.randn(500, 20, generator=generator)]).tolist() == []  # control: none without outliers
    assert heavy_rows([torch.zeros(30, 20)]).tolist() == []


def test_too_few_rows_and_broken_ones_are_named() -> None:
    with pytest.raises(ValueError, match="20 rows of width 20"):
        heavy_rows([torch.ones(20, 20)])
    with pytest.raises(ValueError, match="0 rows of width 0"):
        heavy_rows([])
    x = torch.ones(30, 4)
    x[7, 1] = torch.inf
    with pytest.raises(ValueError, match=r"rows \[7\] hold nan or inf"):
        heavy_rows([x])
