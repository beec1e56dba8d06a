"""Permutation p-values have the right size, and permuted labels keep what the design keeps."""

import numpy as np
import pytest
import torch
from scipy import stats

from subspace_probe.linalg.permutations import permutation_p, permute_labels


def test_p_values_agree_with_scipys_rule() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.8, 1, 12), rng.normal(0, 1, 12)
    for side in ("greater", "less"):
        reference = stats.permutation_test(
            (x, y),
            lambda a, b, axis: a.mean(axis) - b.mean(axis),
            alternative=side,
            n_resamples=999,
            rng=1,
            vectorized=True,
        )
        null = torch.from_numpy(reference.null_distribution)
        assert permutation_p(float(reference.statistic), null, side=side) == pytest.approx(reference.pvalue)


def test_p_values_are_never_zero_and_two_sided_does_not_assume_a_centre() -> None:
    null = 0.5 + torch.randn(999, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.05
    assert permutation_p(0.9, null) == pytest.approx(2 / 1000)
    assert permutation_p(0.1, null) == pytest.approx(2 / 1000)  # counting |null| >= |observed| would say 1.0
    assert permutation_p(0.5, null) > 0.9
    assert permutation_p(0.5, null) <= 1.0
    # Equal up to the rounding of a sum is a tie, and ties count against the claim.
    assert permutation_p(0.3, torch.tensor([0.1 + 0.2 - 1e-16], dtype=torch.float64), side="greater") == 1.0


def test_p_values_are_valid_under_the_null() -> None:
    drawn = torch.randn(2000, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = [permutation_p(float(row[0]), row[1:]) for row in drawn]
    for level in (0.05, 0.1, 0.3):
        assert np.mean(np.array(values) <= level) <= level + 0.02


def test_p_values_refuse_nan_and_nothing() -> None:
    with pytest.raises(ValueError, match="0 draws"):
        permutation_p(1.0, torch.zeros(0))
    with pytest.raises(ValueError, match=r"2 draws \(1 nan\)"):
        permutation_p(1.0, torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="observed=nan"):
        permutation_p(float("nan"), torch.ones(2))


def test_plain_shuffles_keep_counts_and_are_uniform() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    drawn = torch.stack([permute_labels(labels, seed=seed) for seed in range(1200)])
    assert (drawn.sum(1) == 2).all()
    counts = torch.unique(drawn, dim=0, return_counts=True)[1]
    assert len(counts) == 6  # all arrangements
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert drawn.dtype == labels.dtype
    assert torch.equal(permute_labels(labels, seed=5), permute_labels(labels, seed=5))


def test_pairs_swap_by_independent_fair_coins() -> None:
    labels = torch.tensor([1, 0, 0, 1, 1, 0])
    pairs = torch.tensor([9, 9, 4, 4, 6, 6])
    drawn = torch.stack([permute_labels(labels, pairs=pairs, seed=seed) for seed in range(1200)])
    for pair in (4, 6, 9):
        assert (drawn[:, pairs == pair].sum(1) == 1).all()
    counts = torch.unique(drawn, dim=0, return_counts=True)[1]
    assert len(counts) == 8
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # Control: the plain shuffle tears pairs apart.
    plain = torch.stack([permute_labels(labels, seed=seed) for seed in range(100)])
    assert not (plain[:, :2].sum(1) == 1).all()


def test_pairs_of_many_rows_swap_whole_prompts() -> None:
    labels = torch.tensor([1, 1, 1, 0, 0, 2, 2])
    pairs = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    drawn = {tuple(permute_labels(labels, pairs=pairs, seed=seed).tolist()) for seed in range(50)}
    assert drawn == {(1, 1, 1, 0, 0, 2, 2), (0, 0, 0, 1, 1, 2, 2)}  # a pair with one label has nothing to swap


def test_pairs_of_one_group_swap_together() -> None:
    labels = torch.tensor([1, 0, 1, 0, 0, 1])
    pairs, groups = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([5, 5, 5, 5, 8, 8])
    drawn = {tuple(permute_labels(labels, pairs=pairs, groups=groups, seed=seed).tolist()) for seed in range(60)}
    assert drawn == {(a, 1 - a, a, 1 - a, b, 1 - b) for a in (0, 1) for b in (0, 1)}
    with pytest.raises(ValueError, match=r"1 pairs lie in more than one group\. Give the rows"):
        permute_labels(labels, pairs=pairs, groups=torch.tensor([0, 1, 2, 2, 3, 3]), seed=0)


def test_groups_alone_exchange_their_labels() -> None:
    labels, groups = torch.tensor([1, 1, 0, 0, 0, 1]), torch.tensor([3, 3, 1, 1, 1, 2])
    drawn = {tuple(permute_labels(labels, groups=groups, seed=seed).tolist()) for seed in range(60)}
    assert drawn == {(1, 1, 0, 0, 0, 1), (0, 0, 1, 1, 1, 1), (1, 1, 1, 1, 1, 0)}
    with pytest.raises(ValueError, match=r"1 groups hold more than one label\. Pass `pairs` as well"):
        permute_labels(torch.tensor([1, 0]), groups=torch.tensor([0, 0]), seed=0)


def test_three_labels_in_a_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"some pair has three or more\. Split that pair"):
        permute_labels(torch.tensor([0, 1, 2]), pairs=torch.tensor([0, 0, 0]), seed=0)
