"""Thresholds: the rule against the Beta distribution of order statistics, by enumeration and by simulation."""

import numpy as np
import pytest
from scipy import stats


@pytest.mark.parametrize(
    ("target", "confidence", "fewest"),
    [(0.01, None, 99), (0.05, None, 19), (0.5, None, 1), (0.01, 0.95, 299), (0.001, 0.95, 2995), (0.05, 0.95, 59)],
)
def test_the_fewest_negatives_are_those_of_the_rule(target: float, confidence: float | None, fewest: int) -> None:
    """299 for 1 % at 95 % and 2,995 for 0.1 %, as zero events of n at (1 - a)^n <= 0.05; and one fewer will not do."""
    from subspace_probe.core.errors import DataError
    from subspace_probe.guard.thresholds import needed, threshold_at

    assert needed(target, confidence) == fewest
    scores = np.random.default_rng(0).normal(size=fewest)
    made = threshold_at(scores, target_fpr=target, confidence=confidence)
    assert made.false_positives == (0 if confidence is not None else made.false_positives)
    with pytest.raises(DataError, match=f"at least {fewest}"):
        threshold_at(scores[1:], target_fpr=target, confidence=confidence)


@pytest.mark.parametrize("n", [299, 300, 472, 473, 1000, 5000])
@pytest.mark.parametrize(("target", "confidence"), [(0.01, 0.95), (0.02, 0.9), (0.01, None)])
def test_the_rule_is_the_tightest_that_the_beta_distribution_allows(
    n: int, target: float, confidence: float | None
) -> None:
    """The rate of the k-th order statistic is Beta(n + 1 - k, k): the promise holds, and not with one more flagged."""
    from subspace_probe.guard.thresholds import allowed

    flagged = allowed(n, target, confidence)

    def kept(m: int) -> bool:
        rate = stats.beta(m + 1, n - m)
        return rate.mean() <= target + 1e-12 if confidence is None else rate.cdf(target) >= confidence

    assert kept(flagged)
    assert not kept(flagged + 1)


def test_the_bound_is_the_clopper_pearson_bound_of_scipy() -> None:
    from subspace_probe.guard.thresholds import threshold_at

    made = threshold_at(np.random.default_rng(1).normal(size=1000), target_fpr=0.02, confidence=0.9)
    expected = stats.binomtest(made.false_positives, made.n, alternative="less").proportion_ci(0.9, "exact").high
    assert made.bound == pytest.approx(expected)
    assert made.bound <= 0.02


@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "exponential"])
def test_the_realised_rate_follows_the_beta_distribution_whatever_the_scores(draw: str) -> None:
    """2,000 sets of 400 negatives: mean rate and share above the target within three standard errors."""
    from subspace_probe.guard.thresholds import allowed, threshold_at

    rng, n, sets = np.random.default_rng(0), 400, 2000
    cdf = {"normal": stats.norm.cdf, "standard_cauchy": stats.cauchy.cdf, "exponential": stats.expon.cdf}[draw]
    for confidence in (0.95, None):
        values = [
            threshold_at(getattr(rng, draw)(size=n), target_fpr=0.02, confidence=confidence).value for _ in range(sets)
        ]
        rates = 1 - cdf(np.array(values))
        flagged = allowed(n, 0.02, confidence)
        beta = stats.beta(flagged + 1, n - flagged)
        assert abs(rates.mean() - beta.mean()) < 3 * beta.std() / sets**0.5
        above = beta.sf(0.02)
        assert abs((rates > 0.02).mean() - above) < 3 * (above * (1 - above) / sets) ** 0.5
        assert stats.kstest(rates, beta.cdf).pvalue > 1e-3


def test_an_interpolated_quantile_breaks_the_promise() -> None:
    """The control: what others do has more than twice the rate asked for at n = 50, as measured elsewhere."""
    rng = np.random.default_rng(0)
    rates = [stats.norm.sf(np.quantile(rng.normal(size=50), 0.99)) for _ in range(2000)]
    assert np.mean(rates) > 0.02


def test_ties_and_groups_keep_the_promise() -> None:
    """Ties let fewer through; a group counts once, by its highest score, and copies add no evidence."""
    from subspace_probe.core.errors import DataError
    from subspace_probe.guard.thresholds import threshold_at

    rng = np.random.default_rng(0)
    rounded = threshold_at(rng.normal(size=1000).round(), target_fpr=0.1)
    assert rounded.false_positives <= 100
    scores, groups = rng.normal(size=1200), np.repeat(np.arange(400), 3)
    made = threshold_at(scores, target_fpr=0.02, groups=groups)
    alone = threshold_at(scores.reshape(400, 3).max(axis=1), target_fpr=0.02)
    assert (made.value, made.n, made.grouped) == (alone.value, 400, True)
    copies = np.repeat(rng.normal(size=30), 10)
    assert threshold_at(copies, target_fpr=0.02).n == 300  # taken for independent, and so too few to be
    with pytest.raises(DataError, match="on 30 groups of negatives"):
        threshold_at(copies, target_fpr=0.02, groups=np.repeat(np.arange(30), 10))


def test_bad_input_is_named() -> None:
    from subspace_probe.core.errors import ConfigError, DataError
    from subspace_probe.guard.thresholds import threshold_at

    scores = np.zeros(400)
    for settings, words in (
        ({"target_fpr": 0.0}, "between 0 and 1"),
        ({"target_fpr": 1.0}, "between 0 and 1"),
        ({"confidence": 0.4}, "between 0.5 and 1"),
        ({"confidence": 1.0}, "between 0.5 and 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            threshold_at(scores, **settings)
    for wrong in (np.full(400, np.nan), np.zeros((400, 1))):
        with pytest.raises(DataError, match="one number a negative"):
            threshold_at(wrong)
    with pytest.raises(DataError, match="one group a score"):
        threshold_at(scores, groups=np.zeros(3, dtype=int))
