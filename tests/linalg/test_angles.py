"""Angles against construction, scipy and simulation."""

import inspect
import math

import numpy as np
import pytest
import torch
from scipy import linalg

from subspace_probe.linalg.angles import cosine, mode_subspace_overlap, overlap, principal_angles
from subspace_probe.linalg.bases import orthonormalise, random_subspace


def planted(angles: list[float], d: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Two subspaces with these principal angles, in a random position."""
    frame = random_subspace(2 * len(angles), d, seed=5, dtype=torch.float64)
    a, b = frame[: len(angles)], frame[len(angles) :]
    theta = torch.tensor(angles, dtype=torch.float64)[:, None]
    turn = random_subspace(len(angles), len(angles), seed=6, dtype=torch.float64)
    return a, turn @ (a * theta.cos() + b * theta.sin())


def test_cosine_is_signed_and_accurate() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert cosine(a, b) == pytest.approx(0.96, abs=1e-15)
    assert cosine(a, -b) == pytest.approx(-0.96, abs=1e-15)
    assert cosine(a, a) <= 1.0
    tiny = torch.tensor([1e-200, 1e-200], dtype=torch.float64)
    assert cosine(tiny, tiny) == pytest.approx(1.0)
    assert cosine(a.bfloat16(), a.bfloat16()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="the second is zero or not finite"):
        cosine(a, torch.zeros(2))
    with pytest.raises(ValueError, match="widths 2 and 3"):
        inspect.unwrap(cosine)(a, torch.ones(3))


def test_principal_angles_are_accurate_at_both_ends() -> None:
    angles = [1e-12, 1e-7, 0.3, math.pi / 2 - 1e-9]
    a, b = planted(angles)
    np.testing.assert_allclose(principal_angles(a, b), angles, rtol=1e-3, atol=1e-15)
    # Control: the arc cosine alone cannot see the small ones.
    naive = torch.linalg.svdvals(a @ b.T).clamp(max=1).acos()
    assert abs(float(naive[0]) - 1e-12) > 1e-9 or float(naive[0]) == 0.0


@pytest.mark.parametrize(("k", "l"), [(1, 1), (2, 5), (5, 2), (4, 4), (7, 6)])
def test_principal_angles_agree_with_scipy(k: int, l: int) -> None:  # noqa: E741
    rows = torch.randn(k + l, 10, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    a, b = rows[:k], rows[k:]  # not orthonormal: only the span counts
    expected = np.sort(linalg.subspace_angles(a.numpy().T, b.numpy().T))
    np.testing.assert_allclose(principal_angles(a, b), expected, atol=1e-10)


def test_overlap_is_the_mean_squared_cosine() -> None:
    angles = [0.1, 0.5, 1.2]
    a, b = planted(angles)
    expected = float(np.mean(np.cos(angles) ** 2))
    assert overlap(a, b) == pytest.approx(expected, abs=1e-12)
    assert mode_subspace_overlap(a, b) == pytest.approx(expected, abs=1e-12)
    assert overlap(a, -b) == overlap(a, b)  # unsigned
    assert overlap(a[:2], a) == pytest.approx(1.0)  # contained
    assert mode_subspace_overlap(a.float(), b.float()) == pytest.approx(expected, abs=1e-6)


def test_mode_subspace_overlap_refuses_what_its_formula_does_not_hold_for() -> None:
    a, b = planted([0.1, 0.5])
    skewed = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64) @ b  # same span
    assert overlap(a, skewed) == pytest.approx(overlap(a, b))
    assert float((a @ skewed.T).square().sum() / 2) > 1.1  # what the formula alone would say
    with pytest.raises(ValueError, match="orthonormal bases; the second is off"):
        mode_subspace_overlap(a, skewed)


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="one has rank 0"):
        overlap(torch.zeros(0, 3), orthonormalise(torch.ones(1, 3)))
