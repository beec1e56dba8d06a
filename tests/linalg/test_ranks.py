"""Ranks on planted spectra, with the share-of-variance rule as control; the closed form against drawn noise."""

import numpy as np
import pytest
import torch

from subspace_probe.linalg.bases import random_subspace
from subspace_probe.linalg.moments import Moments
from subspace_probe.linalg.ranks import noise_edge, parallel_analysis


def rows(n: int, d: int, rank: int, *, strength: float = 3.0, seed: int = 0) -> torch.Tensor:
    """White noise and `rank` planted components of standard deviation `strength`, in a random position."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if rank:
        basis = random_subspace(rank, d, seed=seed + 100, dtype=torch.float64)
        x += strength * torch.randn(n, rank, generator=generator, dtype=torch.float64) @ basis
    return x


def covariance(x: torch.Tensor) -> torch.Tensor:
    return Moments.empty(x.shape[1]).update(x).covariance()


def test_finds_the_planted_rank_where_a_share_of_the_variance_keeps_noise() -> None:
    x = rows(2000, 256, 8)
    found = parallel_analysis(covariance(x), 2000)
    assert found.rank == 8
    assert int((found.p < 0.05).sum()) == 8
    variances = torch.linalg.eigvalsh(covariance(x)).flip(0)
    assert int((variances.cumsum(0) / variances.sum() < 0.99).sum()) + 1 > 200  # control
    wanted = np.linalg.eigvalsh(np.corrcoef(x.numpy().T))[::-1]
    np.testing.assert_allclose(found.eigenvalues, wanted, rtol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(200, 60), (60, 200), (1000, 30)])
def test_the_largest_eigenvalue_of_noise_is_where_the_closed_form_says(n: int, d: int) -> None:
    """White rows drawn and squared with NumPy: mean and deviation of the Tracy-Widom law, -1.2065 and 1.268."""
    rng = np.random.default_rng(0)
    tops = [np.linalg.eigvalsh(x.T @ x / n)[-1] for x in rng.standard_normal((300, n, d))]
    centre, scale = noise_edge(d, n)
    standard = (np.array(tops) - centre) / scale
    assert abs(standard.mean() + 1.2065) < 0.25
    assert abs(standard.std() / 1.268 - 1) < 0.12
    # control: for another number of rows the law is elsewhere
    centre, scale = noise_edge(d, int(1.3 * n))
    assert abs(((np.array(tops) - centre) / scale).mean() + 1.2065) > 1


@pytest.mark.parametrize("n", [60, 400])
def test_pure_noise_rarely_has_a_component(n: int) -> None:
    """Fewer rows than coordinates, and more; unequal variances. 5 % at most, 1 to 3 % measured."""
    deviations = torch.linspace(0.1, 3.0, 100, dtype=torch.float64)
    ranks = [parallel_analysis(covariance(rows(n, 100, 0, seed=s) * deviations), n).rank for s in range(60)]
    assert sum(rank > 0 for rank in ranks) <= 8  # 3 expected at the nominal level; 9 or more has probability 4e-3
    few = [parallel_analysis(covariance(rows(n, 100, 3, seed=s)), n).rank for s in range(3)]
    assert few == [3, 3, 3]


def test_a_coordinate_that_varies_much_is_no_component_and_a_rotated_one_is() -> None:
    x = rows(1000, 60, 0) * torch.linspace(0.1, 3.0, 60, dtype=torch.float64)
    assert parallel_analysis(covariance(x), 1000).rank == 0
    turn = random_subspace(60, 60, seed=1, dtype=torch.float64)
    assert parallel_analysis(covariance(x @ turn), 1000).rank > 0  # now coordinates depend on each other


def test_the_rank_does_not_depend_on_units_order_or_means() -> None:
    x = rows(500, 40, 4)
    scaled = x * torch.linspace(0.01, 100, 40, dtype=torch.float64)
    kinds = (x, 1e-3 * x, 1e6 * x, x + 100, x.flip(0), x.flip(1), scaled)
    assert {parallel_analysis(covariance(y), 500).rank for y in kinds} == {4}


def test_second_moments_about_zero_count_a_mean_as_a_component() -> None:
    """Differences within pairs: noise is symmetric about zero, a common shift is not noise."""
    x = rows(300, 30, 0)
    shifted = x + torch.full((30,), 0.3, dtype=torch.float64)
    assert [parallel_analysis(y.T @ y / 300, 300, ddof=0).rank for y in (x, shifted)] == [0, 1]
    assert parallel_analysis(covariance(shifted), 300).rank == 0  # control: about the mean it is gone


def test_fewer_independent_rows_make_it_harder() -> None:
    """Copies of 40 rows are not 400: taken for independent, noise has components."""
    x = rows(40, 30, 0).repeat(10, 1)
    assert parallel_analysis(covariance(x), 400).rank > 0
    assert parallel_analysis(covariance(x), 40).rank == 0


def test_constant_coordinates_have_no_correlations_and_bad_input_is_named() -> None:
    assert parallel_analysis(torch.zeros(5, 5), 10).rank == 0
    assert parallel_analysis(torch.diag(torch.tensor([1.0, 0.0, 0.0])), 10).rank == 0
    for bad in ({"n": 1}, {"n": 10, "level": 1.0}, {"n": 2, "ddof": 2}):
        with pytest.raises(ValueError, match="parallel_analysis was asked for"):
            parallel_analysis(torch.eye(4), **bad)
    with pytest.raises(ValueError, match="covariance with nan or inf"):
        parallel_analysis(torch.full((2, 2), torch.nan), 10)
    with pytest.raises(ValueError, match="noise_edge was asked for 0 rows of 3 coordinates"):
        noise_edge(3, 0)
