"""Nulls of cosines and overlaps against closed forms, simulation of whole data, and each other."""

import inspect
import math

import pytest
import torch
from scipy import stats

from subspace_probe.linalg.angles import overlap, principal_angles
from subspace_probe.linalg.bases import covariance_matched_directions, random_directions, random_subspace
from subspace_probe.linalg.nulls import (
    chance_overlap,
    cosine_null,
    isotropic_cosine_quantile,
    isotropic_overlap_null,
    overlap_null,
    top_cosine_null,
)


def power_law(d: int) -> torch.Tensor:
    """A covariance with eigenvalues 1 / i, in a random position."""
    frame = random_subspace(d, d, seed=9, dtype=torch.float64)
    return frame.T @ (frame / torch.arange(1, d + 1)[:, None])


@pytest.mark.parametrize(("k", "l", "d"), [(1, 1, 20), (2, 6, 20), (8, 3, 20)])
def test_chance_overlap_is_the_mean_over_random_subspaces(k: int, l: int, d: int) -> None:  # noqa: E741
    fixed = random_subspace(l, d, seed=10_000)
    drawn = torch.tensor([overlap(random_subspace(k, d, seed=seed), fixed) for seed in range(150)])
    error = float(drawn.std()) / 150**0.5
    assert abs(float(drawn.mean()) - chance_overlap(k, l, d)) < 4 * error
    with pytest.raises(ValueError, match="ranks run from 1 to 20"):
        chance_overlap(0, l, d)


def test_isotropic_quantile_matches_simulation_and_closed_forms() -> None:
    assert isotropic_cosine_quantile(2, 0.75) == pytest.approx(math.cos(math.pi / 4))  # arcsine law
    assert isotropic_cosine_quantile(3, 0.75) == pytest.approx(0.5)  # Archimedes: uniform on [-1, 1]
    assert isotropic_cosine_quantile(4096, 0.975) == pytest.approx(1.96 / 64, rel=1e-3)  # nearly normal
    drawn = random_directions(100_000, 16, seed=0, dtype=torch.float64)[:, 0]
    assert float(drawn.quantile(0.9)) == pytest.approx(isotropic_cosine_quantile(16, 0.9), abs=0.005)
    with pytest.raises(ValueError, match=r"d=1, q=0\.5"):
        isotropic_cosine_quantile(1, 0.5)


def test_cosine_null_is_isotropic_for_white_data_and_wider_otherwise() -> None:
    d = 32
    white = cosine_null(torch.eye(d), n=4000, seed=0)
    beta = stats.beta((d - 1) / 2, (d - 1) / 2, loc=-1, scale=2)
    assert stats.kstest(white.numpy(), beta.cdf).pvalue > 1e-3
    spiked = torch.eye(d)
    spiked[0, 0] = 200.0
    null = cosine_null(spiked, n=4000, seed=0)
    assert null.dtype == torch.float64
    # Judged by the isotropic formula most unrelated pairs of this data look related; by their own null 5 % do.
    edge = isotropic_cosine_quantile(d, 0.975)
    assert float((null.abs() > edge).double().mean()) > 0.5
    fresh = cosine_null(spiked, n=4000, seed=1)
    assert float((fresh.abs() > null.abs().quantile(0.95)).double().mean()) == pytest.approx(0.05, abs=0.015)


def test_random_splits_of_data_with_a_power_law_are_covered_by_the_covariance_null_only() -> None:
    """Mean differences of label-free random splits: |cos| up to 0.3 in 768 dimensions, where the formula says 0.07."""
    n, d, trials = 400, 768, 300
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator) / torch.arange(1, d + 1).sqrt()
    half = torch.cat([torch.ones(n // 2), -torch.ones(n // 2)])
    signs = torch.stack([half[torch.randperm(n, generator=generator)] for _ in range(2 * trials)])
    drawn = torch.nn.functional.normalize(signs @ x, dim=1).double()
    cosines = (drawn[:trials] * drawn[trials:]).sum(1).abs()
    observed = float(cosines.quantile(0.95))
    null = cosine_null(torch.cov(x.T), seed=0).abs()
    isotropic = isotropic_cosine_quantile(d, 0.975)
    assert 0.25 < observed < 0.40
    assert isotropic == pytest.approx(0.07, abs=0.002)
    assert float(null.quantile(0.95)) == pytest.approx(observed, abs=0.07)
    assert float((cosines > null.quantile(0.95)).double().mean()) < 0.12
    assert float((cosines > isotropic).double().mean()) > 0.4  # control: the formula calls most of them related


@pytest.mark.parametrize(("k", "l"), [(1, 1), (3, 8), (8, 3)])
def test_overlap_null_is_the_chance_overlap_for_white_data(k: int, l: int) -> None:  # noqa: E741
    null = overlap_null(torch.eye(40), k, l, n=2000, seed=0)
    assert float(null.mean()) == pytest.approx(chance_overlap(k, l, 40), abs=5 * float(null.std()) / 2000**0.5)
    assert null.dtype == torch.float64
    anisotropic = overlap_null(power_law(40), k, l, n=2000, seed=0)
    assert float(anisotropic.mean()) > 1.2 * chance_overlap(k, l, 40)  # control: it would not be, were data forgotten


@pytest.mark.parametrize(("k", "l"), [(1, 1), (3, 8), (8, 3), (30, 25), (40, 2)])
def test_isotropic_overlaps_are_those_of_white_data(k: int, l: int) -> None:  # noqa: E741
    null, slow = isotropic_overlap_null(40, k, l, n=2000, seed=0), overlap_null(torch.eye(40), k, l, n=2000, seed=1)
    error = float(null.std()) / 2000**0.5
    assert float(null.mean()) == pytest.approx(chance_overlap(k, l, 40), abs=max(3 * error, 1e-12))
    if max(k, l) < 40:  # else every draw is 1, up to rounding
        assert stats.ks_2samp(null.numpy(), slow.numpy()).pvalue > 1e-3
        anisotropic = overlap_null(power_law(40), k, l, n=2000, seed=0)
        assert abs(float(anisotropic.mean()) - chance_overlap(k, l, 40)) > 3 * error  # control


def test_isotropic_overlaps_need_no_matrix_of_the_width() -> None:
    wide = isotropic_overlap_null(128_000, 2, 3, n=20, seed=0)  # an identity of it would take 131 GB
    assert float(wide.mean()) == pytest.approx(3 / 128_000, rel=0.7)


def test_overlap_null_is_the_overlap_of_directions_drawn_one_by_one() -> None:
    covariance, k, l, n = power_law(30), 2, 5, 400  # noqa: E741
    drawn = covariance_matched_directions((k + l) * n, covariance, seed=3).reshape(n, k + l, 30)
    slow = torch.tensor([overlap(rows[:k], rows[k:]) for rows in drawn])
    top = torch.tensor([float(principal_angles(rows[:k], rows[k:])[0].cos()) for rows in drawn])
    assert stats.ks_2samp(slow.numpy(), overlap_null(covariance, k, l, n=2000, seed=0).numpy()).pvalue > 1e-3
    assert stats.ks_2samp(top.numpy(), top_cosine_null(covariance, k, l, n=2000, seed=0).numpy()).pvalue > 1e-3
    assert stats.ks_2samp(slow.numpy(), overlap_null(torch.eye(30), k, l, n=2000, seed=0).numpy()).pvalue < 1e-6


def test_directions_of_two_kinds_of_states_have_the_null_of_both() -> None:
    """Two covariances that share no direction give no cosine at all; the first alone would give a wide null."""
    first, second = torch.zeros(20, 20), torch.zeros(20, 20)
    first[:4, :4], second[10:, 10:] = torch.eye(4), torch.eye(10)
    assert float(cosine_null(first, covariance_b=second, n=50, seed=0).abs().max()) < 1e-12
    assert float(overlap_null(first, 2, 3, covariance_b=second, n=50, seed=0).max()) < 1e-12
    assert float(cosine_null(first, n=50, seed=0).abs().median()) > 0.2
    assert float(overlap_null(first, 4, 4, n=5, seed=0).min()) == pytest.approx(1.0)  # the whole support


def test_large_subspaces_always_share_a_direction_nearly() -> None:
    top = top_cosine_null(torch.eye(768), 100, 100, n=5, seed=0)
    edge = 2 * math.sqrt(100 / 768 * (1 - 100 / 768))  # the Jacobi edge
    assert float(top.mean()) == pytest.approx(0.66, abs=0.015)
    assert float(top.mean()) == pytest.approx(edge, abs=0.015)  # asymptotic, slightly high
    assert float(top_cosine_null(torch.eye(20), 12, 12, n=5, seed=0).min()) == pytest.approx(1.0)  # k + l > d


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.linalg import nulls

    whole = overlap_null(power_law(24), 3, 4, n=5, seed=1)
    assert torch.equal(whole, overlap_null(power_law(24), 3, 4, n=5, seed=1))
    assert not torch.equal(whole, overlap_null(power_law(24), 3, 4, n=5, seed=2))
    monkeypatch.setattr(nulls, "_CELLS", 2 * 24 * 7)
    parts = overlap_null(power_law(24), 3, 4, n=500, seed=1)
    monkeypatch.undo()
    assert stats.ks_2samp(parts.numpy(), overlap_null(power_law(24), 3, 4, n=500, seed=1).numpy()).pvalue > 1e-3


def test_what_cannot_be_drawn_is_refused() -> None:
    flat = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="rank 1 and 3, but the covariance of width 4 has rank 2"):
        overlap_null(flat, 1, 3, n=2, seed=0)
    with pytest.raises(ValueError, match="subspaces of rank 0 and 1"):
        overlap_null(flat, 0, 1, n=2, seed=0)
    with pytest.raises(ValueError, match="widths 4 and 3"):
        inspect.unwrap(cosine_null)(flat, covariance_b=torch.eye(3), n=2, seed=0)
    with pytest.raises(ValueError, match="n=0 draws"):
        cosine_null(flat, n=0, seed=0)
    with pytest.raises(ValueError, match="ranks 5 and 1 in 4 dimensions"):
        isotropic_overlap_null(4, 5, 1, n=2, seed=0)
    with pytest.raises(ValueError, match="n=0 draws"):
        isotropic_overlap_null(4, 1, 1, n=0, seed=0)
