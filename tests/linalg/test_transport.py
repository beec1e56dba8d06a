"""Rotations and Gaussian maps against SciPy, closed forms and what was planted."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.stats import ortho_group


def _covariance(k: int, seed: int, n: int = 50) -> torch.Tensor:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cov((x * torch.linspace(0.2, 3.0, k, dtype=torch.float64)).T).reshape(k, k)


def _points(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_procrustes_recovers_a_planted_rotation_or_reflection(k: int) -> None:
    from subspace_probe.linalg.transport import procrustes

    source = _points(40, k, 0)
    signs: set[bool] = set()
    for seed in range(6):
        drawn = ortho_group(k, seed=seed).rvs() if k > 1 else np.array([[(-1.0) ** seed]])
        planted = torch.from_numpy(drawn)
        signs.add(bool(torch.linalg.det(planted) > 0))
        found = procrustes(source, 3 * source @ planted.T)  # lengths do not matter
        assert torch.allclose(found, planted, atol=1e-12)
        assert not torch.allclose(found, planted.T, atol=1e-3) or torch.equal(planted, planted.T)  # control
    assert signs == {True, False}


def test_procrustes_is_that_of_scipy_and_no_other_rotation_comes_nearer() -> None:
    from subspace_probe.linalg.transport import procrustes

    source, target = _points(30, 5, 1), _points(30, 5, 2) + 0.5 * _points(30, 5, 1)
    found = procrustes(source.float(), target.float())
    assert found.dtype == torch.float64
    found = procrustes(source, target)
    judge, _ = linalg.orthogonal_procrustes(source.numpy(), target.numpy())
    assert np.allclose(found.numpy().T, judge, atol=1e-12)
    best = float((source @ found.T - target).norm())
    for seed in range(20):
        other = torch.from_numpy(ortho_group(5, seed=seed).rvs())
        assert float((source @ other.T - target).norm()) > best


def test_gaussian_map_is_the_formula_with_scipys_roots() -> None:
    from subspace_probe.linalg.transport import gaussian_map

    for k in (1, 3, 8):
        s, c = _covariance(k, 0), _covariance(k, 1)
        found = gaussian_map(s, c)
        root = linalg.sqrtm(s.numpy())
        inverse = linalg.inv(root)
        judge = inverse @ linalg.sqrtm(root @ c.numpy() @ root) @ inverse
        assert np.allclose(found.numpy(), judge, rtol=1e-8, atol=1e-10)
        assert torch.allclose(found @ s @ found, c, rtol=1e-9, atol=1e-10)
        assert torch.equal(found, found.T)
        assert float(torch.linalg.eigvalsh(found)[0]) > 0
        assert torch.allclose(gaussian_map(c, s), torch.linalg.inv(found), rtol=1e-7, atol=1e-9)
        assert torch.allclose(gaussian_map(s, s), torch.eye(k).double(), atol=1e-10)


def test_gaussian_map_in_one_dimension_is_the_ratio_of_deviations() -> None:
    from subspace_probe.linalg.transport import gaussian_map

    assert float(gaussian_map(torch.tensor([[4.0]]), torch.tensor([[0.25]]))) == pytest.approx(0.25, rel=1e-12)
    commuting = gaussian_map(torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([16.0, 1.0])))
    assert torch.allclose(commuting, torch.diag(torch.tensor([2.0, 1 / 3], dtype=torch.float64)), atol=1e-7)


def test_gaussian_map_moves_points_by_the_bures_distance_and_the_other_root_by_more() -> None:
    from subspace_probe.linalg.transport import gaussian_map

    s, c = _covariance(6, 3), _covariance(6, 4)
    rotation = torch.from_numpy(ortho_group(6, seed=0).rvs())
    c = rotation @ c @ rotation.T  # so that they do not commute

    def moved(t: torch.Tensor) -> float:  # E |t z - z|^2 under N(0, s)
        change = t - torch.eye(6)
        return float((change @ s @ change.T).trace())

    root = linalg.sqrtm(s.numpy())
    bures = float(s.trace() + c.trace()) - 2 * float(np.trace(linalg.sqrtm(root @ c.numpy() @ root).real))
    assert moved(gaussian_map(s, c)) == pytest.approx(bures, rel=1e-9)
    other = torch.from_numpy(linalg.sqrtm(c.numpy()) @ linalg.inv(root))
    assert torch.allclose(other @ s @ other.T, c, atol=1e-8)  # it too has the target's covariance
    assert moved(other) > 1.01 * bures


def test_a_target_may_be_singular_and_a_source_may_not() -> None:
    from subspace_probe.linalg.transport import gaussian_map

    s, low = _covariance(5, 0), _covariance(5, 1, n=3)
    assert int(torch.linalg.matrix_rank(low)) == 2
    found = gaussian_map(s, low)
    assert torch.allclose(found @ s @ found, low, atol=1e-9)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-6)) == 2
    assert torch.allclose(gaussian_map(s, torch.zeros(5, 5)), torch.zeros(5, 5).double(), atol=1e-12)
    with pytest.raises(ValueError, match="rank 2 in 5 dimensions"):
        gaussian_map(low, s)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, g: p(torch.ones(3, 2), torch.ones(4, 2)), "paired row by row"),
        (lambda p, g: p(torch.full((3, 2), float("nan")), torch.ones(3, 2)), "finite"),
        (lambda p, g: p(torch.eye(4)[:2], torch.eye(4)[:2]), "2 pairs in 4 dimensions"),
        (lambda p, g: p(torch.zeros(3, 2), torch.ones(3, 2)), "in 0 of them"),
        (lambda p, g: g(torch.eye(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "symmetric"),
        (lambda p, g: g(torch.eye(2), -torch.eye(2)), "positive semi-definite target"),
        (lambda p, g: g(torch.zeros(2, 2), torch.eye(2)), "rank 0"),
        (lambda p, g: g(torch.full((2, 2), float("inf")), torch.eye(2)), "finite source"),
    ],
)
def test_bad_input_is_refused(call: Callable[..., torch.Tensor], message: str) -> None:
    from subspace_probe.linalg.transport import gaussian_map, procrustes

    with pytest.raises(ValueError, match=message):
        call(procrustes, gaussian_map)
