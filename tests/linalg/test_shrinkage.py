"""Shrinkage against scikit-learn and the published recursion; inverses against dense ones."""

import numpy as np
import pytest
import torch


def _covariance(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3.0, d) + 5
    return x, torch.cov(x.T, correction=0)


@pytest.mark.parametrize(("n", "d"), [(400, 12), (9, 30), (2, 5)])
def test_oas_is_that_of_scikit_learn(n: int, d: int) -> None:
    from sklearn.covariance import oas as judge

    from subspace_probe.linalg.shrinkage import oas

    x, covariance = _covariance(n, d)
    found, alpha = oas(covariance, n)
    expected, expected_alpha = judge(x.numpy())
    assert alpha == pytest.approx(expected_alpha, rel=1e-10)
    assert np.allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert oas(7 * covariance, n)[1] == pytest.approx(alpha, rel=1e-12)  # no unit


def test_oas_is_the_fixed_point_of_the_published_recursion_up_to_terms_of_two_over_d() -> None:
    """The iteration of Chen et al. 2010: an oracle that is fed its own estimate until nothing changes."""
    from subspace_probe.linalg.shrinkage import oas

    n, d = 60, 100
    s = _covariance(n, d)[1].numpy()
    rho = 0.5
    for _ in range(2000):
        sigma = (1 - rho) * s + rho * np.trace(s) / d * np.eye(d)
        cross, square = np.sum(sigma * s), np.trace(sigma) ** 2
        rho = ((1 - 2 / d) * cross + square) / ((n + 1 - 2 / d) * cross + (1 - n / d) * square)
    assert oas(torch.from_numpy(s), n)[1] == pytest.approx(rho, rel=2 / d)
    assert oas(torch.from_numpy(s), 2 * n)[1] != pytest.approx(rho, rel=0.2)  # control: another row count


def test_shrunk_is_that_of_scikit_learn() -> None:
    from sklearn.covariance import shrunk_covariance

    from subspace_probe.linalg.shrinkage import shrunk

    _, covariance = _covariance(40, 9)
    before = covariance.clone()
    for alpha in (0.0, 0.3, 1.0):
        assert np.allclose(shrunk(covariance, alpha).numpy(), shrunk_covariance(covariance.numpy(), alpha), atol=1e-14)
    assert torch.equal(covariance, before)
    assert shrunk(covariance.float(), 0.3).dtype == torch.float32


def test_constant_rows_and_bad_input() -> None:
    from subspace_probe.linalg.shrinkage import inverse_times, oas, shrunk

    assert oas(torch.zeros(3, 3), 10)[1] == 1.0
    assert oas(torch.eye(3), 10)[1] == 1.0  # already the target
    for call, message in (
        (lambda: shrunk(torch.eye(2), 1.5), "alpha=1.5"),
        (lambda: oas(torch.eye(2), 0), "of 0 rows"),
        (lambda: oas(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 5), "symmetric"),
        (lambda: shrunk(torch.tensor([[float("nan")]]), 0.5), "finite"),
        (lambda: inverse_times(torch.zeros(2, 2), torch.ones(1, 2)), "singular"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_products_with_inverses_are_dense_ones() -> None:
    from subspace_probe.linalg.shrinkage import inverse_times, pseudo_inverse_times

    _, full = _covariance(100, 8)
    _, low = _covariance(5, 8)
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert np.allclose(inverse_times(full, rows).numpy(), rows.numpy() @ np.linalg.inv(full.numpy()), rtol=1e-9)
    found, rank = pseudo_inverse_times(low, rows)
    assert rank == 4
    assert np.allclose(
        found.numpy(), rows.numpy() @ np.linalg.pinv(low.numpy(), rcond=1e-10, hermitian=True), rtol=1e-7
    )
    assert pseudo_inverse_times(torch.zeros(8, 8), rows)[1] == 0
