"""Intervals against scipy, and their coverage against simulation, with the naive interval as control."""

import numpy as np
import pytest
import torch
from scipy import stats

from subspace_probe.linalg.resampling import (
    bootstrap_interval,
    bootstrap_statistic,
    clopper_pearson,
    cluster_weights,
    percentile_interval,
    split_halves,
    wilson_interval,
)


def skewed(n: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).exponential(size=n))


def clustered(seed: int, clusters: int = 30, rows: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that share most of their variation with their cluster; the mean is zero."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(clusters, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(clusters, rows, generator=generator, dtype=torch.float64)
    return (shared + 0.3 * noise).flatten(), torch.arange(clusters).repeat_interleave(rows)


def test_the_interval_of_the_mean_is_scipys_bca() -> None:
    values = skewed(15, seed=0).pow(3)  # heavy-tailed: bias correction and acceleration both matter
    estimate, low, high = bootstrap_interval(values, draws=20_000, seed=0)
    reference = stats.bootstrap((values.numpy(),), np.mean, n_resamples=20_000, method="BCa", rng=1)
    expected = reference.confidence_interval
    width = expected.high - expected.low
    assert estimate == pytest.approx(float(values.mean()))
    assert abs(low - expected.low) < 0.04 * width
    assert abs(high - expected.high) < 0.04 * width
    # Control: the percentile interval is measurably elsewhere on skewed data, so the correction is really applied.
    percentile = stats.bootstrap((values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert abs(percentile.confidence_interval.high - high) > 0.03 * width


def test_clusters_widen_the_interval_to_its_coverage() -> None:
    aware, naive = 0, 0
    for seed in range(100):
        values, clusters = clustered(seed)
        _, low, high = bootstrap_interval(values, clusters=clusters, draws=200, seed=seed)
        aware += low <= 0 <= high
        _, low, high = bootstrap_interval(values, draws=200, seed=seed)
        naive += low <= 0 <= high
    assert 0.88 <= aware / 100 <= 0.99
    assert naive / 100 < 0.75  # control: ignoring clusters covers far less than it says


def test_unequal_clusters_weigh_by_rows_and_ids_do_not_matter() -> None:
    values, clusters = clustered(0)
    keep = torch.arange(len(values)) % 7 != 0
    values, clusters = values[keep], clusters[keep]
    first = bootstrap_interval(values, clusters=clusters, seed=0)
    assert first[0] == pytest.approx(float(values.mean()))
    assert bootstrap_interval(values, clusters=1000 - 3 * clusters, seed=0)[0] == pytest.approx(first[0])
    assert bootstrap_interval(values, clusters=clusters * 5 + 2, seed=0) == first
    exact = bootstrap_statistic(lambda i: float(values[i].mean()), len(values), clusters=clusters, draws=3000, seed=1)
    low, high = percentile_interval(exact, 0.95)
    assert first[1:] == pytest.approx((low, high), abs=0.06)


def test_other_statistics() -> None:
    values = skewed(60, seed=3)
    estimate, low, high = bootstrap_interval(values, statistic="median", seed=0)
    reference = stats.bootstrap((values.numpy(),), np.median, n_resamples=5000, method="percentile", rng=1)
    assert estimate == pytest.approx(float(np.median(values.numpy())))
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval), abs=0.06)
    drawn = bootstrap_statistic(lambda i: float(values[i].std()), 60, draws=1000, seed=0)
    expected = stats.bootstrap((values.numpy(),), lambda v: np.std(v, ddof=1), n_resamples=1000, method="basic", rng=1)
    assert float(drawn.std()) == pytest.approx(expected.standard_error, rel=0.1)
    again = bootstrap_statistic(lambda i: float(values[i].std()), 60, draws=1000, seed=0)
    assert torch.equal(drawn, again)


def test_booleans_and_constant_values() -> None:
    flags = torch.arange(50) % 5 == 0
    estimate, low, high = bootstrap_interval(flags, seed=0)
    assert estimate == pytest.approx(0.2)
    assert low < 0.2 < high
    assert bootstrap_interval(torch.ones(9), seed=0) == pytest.approx((1.0, 1.0, 1.0))


def test_weights_count_draws_with_replacement_in_blocks() -> None:
    blocks = list(cluster_weights(5, 1000, seed=0, width=10_000))
    assert len(blocks) > 1
    weights = torch.cat(blocks)
    assert weights.shape == (1000, 5)
    assert (weights.sum(1) == 5).all()
    assert float(weights.var()) == pytest.approx(5 * 0.2 * 0.8, rel=0.1)  # binomial(5, 1/5)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 17), (10, 10), (480, 500)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_binomial_intervals_agree_with_scipy(successes: int, n: int, level: float) -> None:
    test = stats.binomtest(successes, n)
    for interval, method in ((wilson_interval, "wilson"), (clopper_pearson, "exact")):
        expected = test.proportion_ci(level, method=method)
        assert interval(successes, n, level) == pytest.approx((successes / n, expected.low, expected.high), abs=1e-12)


def test_clopper_pearson_never_covers_less_than_it_says() -> None:
    n, level = 15, 0.9
    coverage = {}
    for name, interval in (("exact", clopper_pearson), ("wilson", wilson_interval)):
        bounds = [interval(successes, n, level)[1:] for successes in range(n + 1)]
        coverage[name] = [
            sum(stats.binom(n, p).pmf(s) for s, (low, high) in enumerate(bounds) if low <= p <= high)
            for p in np.linspace(0.02, 0.98, 49)
        ]
    assert min(coverage["exact"]) >= level
    assert min(coverage["wilson"]) < level  # control: Wilson dips below at some p, and is nearer on average
    assert abs(np.mean(coverage["wilson"]) - level) < abs(np.mean(coverage["exact"]) - level)


@pytest.mark.parametrize("n", [2, 9, 100])
def test_split_halves_is_a_balanced_partition(n: int) -> None:
    first, second = split_halves(n, seed=0)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(n))
    assert abs(len(first) - len(second)) <= 1
    assert first.tolist() == sorted(first.tolist())
    if n == 100:
        assert not torch.equal(first, split_halves(n, seed=1)[0])


def test_split_halves_keeps_groups_together() -> None:
    groups = torch.tensor([7, 7, 7, 1, 1, 2, 3, 3, 4, 5, 5, 5, 6])
    for seed in range(20):
        first, second = split_halves(len(groups), groups=groups, seed=seed)
        assert not set(groups[first].tolist()) & set(groups[second].tolist())
        assert abs(len(first) - len(second)) <= 3  # at most the largest group
    # Control: without groups they are torn apart.
    first, second = split_halves(len(groups), seed=0)
    assert set(groups[first].tolist()) & set(groups[second].tolist())


def test_bad_questions_are_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"at least two independent rows or clusters; found 1 among 3 rows\. Add data"):
        bootstrap_interval(torch.ones(3), clusters=torch.zeros(3, dtype=torch.long), seed=0)
    with pytest.raises(ValueError, match="asked for 4 rows; 3 cluster ids"):
        bootstrap_statistic.__wrapped__(lambda i: 0.0, 4, clusters=torch.arange(3), seed=0)
    with pytest.raises(ValueError, match=r"rows \[1\] are nan or inf"):
        bootstrap_interval(torch.tensor([0.0, float("nan")]), seed=0)
    with pytest.raises(ValueError, match=r"level 95\.0; a level lies between 0 and 1"):
        bootstrap_interval(torch.ones(3), level=95.0, seed=0)
    with pytest.raises(ValueError, match="11 successes in 10 trials"):
        wilson_interval(11, 10)
    with pytest.raises(ValueError, match="-1 successes"):
        clopper_pearson(-1, 10)
    with pytest.raises(ValueError, match="found 0 among 0 rows"):
        split_halves(0, seed=0)
