"""Calibration figures against a naive count, scikit-learn, and samples whose probabilities are right."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss


def naive_ece(p: np.ndarray, y: np.ndarray, bins: int) -> float:
    total = 0.0
    for rows in np.array_split(np.argsort(p), bins):
        total += len(rows) * abs(p[rows].mean() - y[rows].mean())
    return total / len(p)


def test_ece_is_the_naive_one_and_brier_is_scikit_learns() -> None:
    from subspace_probe.guard.reliability import Bins, brier, expected_calibration_error

    rng = np.random.default_rng(0)
    p = rng.random(450)
    y = rng.random(450) < p
    error = expected_calibration_error(p, y, Bins.of(p))[0]
    assert error == pytest.approx(naive_ece(p, y, 15))
    assert error > naive_ece(p, y, 3) + 0.01  # the control: in fewer bins errors of both signs cancel
    weights = rng.integers(0, 3, size=(4, 450)).astype(float)
    expected = [brier_score_loss(y, p, sample_weight=row) for row in weights]
    np.testing.assert_allclose(brier(p, y, weights), expected)
    repeated = np.repeat(np.arange(450), weights[0].astype(int))  # a weight is so many copies
    bins = Bins.of(p)
    copies = Bins(bins.index[repeated], bins.count)
    assert expected_calibration_error(p, y, bins, weights)[0] == pytest.approx(
        expected_calibration_error(p[repeated], y[repeated], copies)[0]
    )


def test_equal_probabilities_share_a_bin() -> None:
    from subspace_probe.guard.reliability import Bins

    p = np.array([0.0] * 40 + [0.5] * 3 + [1.0] * 17)
    bins = Bins.of(p)
    assert bins.count == 3
    assert [len(set(bins.index[p == value])) for value in (0.0, 0.5, 1.0)] == [1, 1, 1]


def test_what_binning_alone_gives_covers_right_probabilities_only() -> None:
    from subspace_probe.guard.reliability import Bins, calibrated_errors, expected_calibration_error

    rng, inside, outside = np.random.default_rng(1), 0, 0
    for seed in range(60):
        p = rng.random(600)
        bins = Bins.of(p)
        low, high = np.quantile(calibrated_errors(p, bins, draws=300, seed=seed), [0.025, 0.975])
        inside += low <= expected_calibration_error(p, rng.random(600) < p, bins)[0] <= high
        outside += low <= expected_calibration_error(p, rng.random(600) < p**2, bins)[0] <= high
    assert inside >= 51  # 95 % of 60, less three standard errors
    assert outside == 0
