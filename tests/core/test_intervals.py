"""Coverage: an interval that claims 95 % holds the truth about that often, also for a handful of prompts."""

import pytest
import torch


@pytest.mark.parametrize("n", [2, 5, 12, 60])
def test_intervals_cover_at_their_level(n: int) -> None:
    from subspace_probe.core.intervals import mean_of

    generator = torch.Generator().manual_seed(n)
    hits = 0
    for seed in range(200):
        x = torch.randn(n, generator=generator, dtype=torch.float64)
        _, interval = mean_of(x, torch.arange(n), seed=seed)
        hits += 0.0 in interval
    assert hits >= 170  # 190 expected; a bootstrap of two prompts alone would hit about 100 times


def test_a_bootstrap_of_two_would_not_cover() -> None:
    """Control: why few groups get another interval."""
    from subspace_probe.linalg.resampling import bootstrap_interval

    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        x = torch.randn(2, generator=generator, dtype=torch.float64)
        _, low, high = bootstrap_interval(x, seed=seed, draws=200)
        hits += low <= 0 <= high
    assert hits < 150


def test_groups_count_once() -> None:
    """Twenty copies of each of twelve prompts are twelve prompts."""
    from subspace_probe.core.intervals import mean_of

    x = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, alone = mean_of(x, torch.arange(12), seed=0)
    _, copied = mean_of(x.repeat_interleave(20), torch.arange(12).repeat_interleave(20), seed=0)
    _, naive = mean_of(x.repeat_interleave(20), torch.arange(240), seed=0)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)


def test_rates_of_nothing_and_of_all_keep_a_width() -> None:
    from subspace_probe.core.intervals import mean_of

    for value in (0.0, 1.0):
        estimate, interval = mean_of(torch.full((64,), value), torch.arange(64), seed=0)
        assert estimate == value
        assert 0.03 < interval.high - interval.low < 0.08


@pytest.mark.parametrize("n", [1, 5, 20, 39, 100, 400])
def test_one_more_draw_falls_into_the_range_as_often_as_it_says(n: int) -> None:
    from subspace_probe.core.intervals import range_of

    generator = torch.Generator().manual_seed(n)
    drawn, more = torch.rand(4000, n, generator=generator), torch.rand(4000, generator=generator)
    found = [range_of(row, "uniform numbers") for row in drawn]
    inside = sum(x in interval for x, interval in zip(more.tolist(), found, strict=True)) / 4000
    assert {interval.level for interval in found} == {found[0].level}
    assert (found[0].level >= 0.95) == (n >= 39)
    assert inside > found[0].level - 0.015
    if n == 20:  # control: interpolated quantiles of so few draws hold fewer
        low, high = drawn.quantile(0.025, dim=1), drawn.quantile(0.975, dim=1)
        assert float(((more >= low) & (more <= high)).double().mean()) < found[0].level - 0.03
