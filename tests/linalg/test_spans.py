"""Spans of nearly dependent vectors, against closed forms."""

import pytest
import torch


def test_rank_condition_and_span_of_vectors_with_a_known_gap() -> None:
    from subspace_probe.linalg import overlap
    from subspace_probe.linalg.spans import span_of

    # two unit vectors at angle t have singular values sqrt(1 + cos t) and sqrt(1 - cos t)
    angle = torch.tensor(0.1, dtype=torch.float64)
    pair = torch.stack([torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor([angle.cos(), angle.sin(), 0.0]).double()])
    found = span_of(pair * torch.tensor([[3.0], [1e-4]]), tolerance=0.04)
    assert torch.allclose(found.singular, torch.stack([(1 + angle.cos()).sqrt(), (1 - angle.cos()).sqrt()]))
    assert found.rank == 2
    assert overlap(found.basis, torch.eye(3, dtype=torch.float64)[:2]) == pytest.approx(1.0)
    assert found.condition == pytest.approx(float(1 / (angle / 2).tan()))
    # the ratio is tan(t / 2) = 0.05: a tolerance above it leaves the direction between them alone
    one = span_of(pair, tolerance=0.06)
    half = torch.tensor([(angle / 2).cos(), (angle / 2).sin(), 0.0], dtype=torch.float64)
    assert one.rank == 1
    assert abs(float(one.basis[0] @ half)) == pytest.approx(1.0)


def test_copies_and_zeros_add_nothing_and_nonsense_is_refused() -> None:
    from subspace_probe.linalg.spans import span_of

    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = span_of(torch.cat([rows, 2 * rows, torch.zeros(1, 8)]), tolerance=0.0)
    assert found.rank == 3
    assert found.n == 7
    assert found.condition > 1e6
    assert torch.allclose(found.basis @ found.basis.T, torch.eye(3), atol=1e-6)
    for wrong in (torch.zeros(2, 3), torch.full((1, 3), float("nan"))):
        with pytest.raises(ValueError, match="span_of was given"):
            span_of(wrong)
    with pytest.raises(ValueError, match="tolerance"):
        span_of(rows, tolerance=1.0)
