"""Figures read off curves, against scikit-learn and by counting; draws and intervals, against closed forms."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve


def sample(seed: int, n: int = 200, ties: bool = True) -> "tuple[np.ndarray, np.ndarray]":
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    scores = rng.normal(size=n) + 1.2 * y
    return (np.round(scores, 1) if ties else scores), y


@pytest.mark.parametrize("ties", [True, False])
def test_areas_are_those_of_scikit_learn_under_any_weights(ties: bool) -> None:
    from subspace_probe.guard.curves import Curves

    for seed in range(10):
        scores, y = sample(seed, ties=ties)
        weights = np.random.default_rng(seed).integers(0, 4, size=(3, len(y))).astype(float)
        curves = Curves(scores, y, weights)
        aurocs = [roc_auc_score(y, scores, sample_weight=row) for row in weights]
        precisions = [average_precision_score(y, scores, sample_weight=row) for row in weights]
        np.testing.assert_allclose(curves.auroc(), aurocs, atol=1e-12)
        np.testing.assert_allclose(curves.average_precision(), precisions, atol=1e-12)
        assert abs(Curves(-scores, y).auroc()[0] - roc_auc_score(y, scores)) > 0.2  # the control: another score


def test_recall_at_a_rate_flags_no_more_than_that_rate() -> None:
    from subspace_probe.guard.curves import Curves

    for seed in range(10):
        scores, y = sample(seed)
        fpr, tpr, _ = roc_curve(y, scores, drop_intermediate=False)
        for rate in (0.0, 0.01, 0.05, 0.3):
            assert Curves(scores, y).tpr_at(rate)[0] == pytest.approx(tpr[fpr <= rate + 1e-12].max())
    interpolated = np.interp(0.01, fpr, tpr)  # the control: between two thresholds there is no threshold
    assert interpolated > Curves(scores, y).tpr_at(0.01)[0]


def test_the_best_f1_is_the_best_of_all_thresholds() -> None:
    from subspace_probe.guard.curves import Curves

    scores, y = sample(3)
    every = [f1_score(y, scores >= threshold) for threshold in np.unique(scores)]
    assert Curves(scores, y).best_f1()[0] == pytest.approx(max(every))


def test_perfect_is_exactly_one_and_reversed_exactly_zero() -> None:
    from subspace_probe.guard.curves import Curves

    y = np.arange(77) % 7 == 0
    weights = np.random.default_rng(0).integers(1, 9, size=(50, 77)).astype(float)
    assert (Curves(y.astype(float), y, weights).auroc() == 1).all()
    assert (Curves(y.astype(float), y, weights).average_precision() == 1).all()
    assert (Curves(-y.astype(float), y, weights).auroc() == 0).all()


def test_what_has_no_curve_is_refused() -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.guard.curves import Curves

    with pytest.raises(DataError, match="0 positive and 3 negative"):
        Curves(np.zeros(3), np.zeros(3, dtype=bool))
    with pytest.raises(DataError, match="1 of them not"):
        Curves(np.array([0.0, np.nan]), np.array([True, False]))


def test_draws_keep_groups_whole_and_every_stratum_as_large_as_it_was() -> None:
    from subspace_probe.guard.group_draws import GroupDraws

    y = np.array([1, 1, 0, 0, 0, 1, 0, 1, 0] * 4, dtype=bool)
    groups = np.repeat(np.arange(12), 3) % 12
    held = [set(y[groups == group].tolist()) for group in range(12)]
    drawn = np.concatenate(list(GroupDraws(y, groups, draws=200, seed=1).weights()))
    by_group = np.stack([drawn[:, groups == group] for group in range(12)])
    assert (by_group == by_group[..., :1]).all()  # all prompts of a group are drawn as often
    for kind in ({True}, {False}, {True, False}):
        members = [group for group in range(12) if held[group] == kind]
        assert (by_group[members, :, 0].sum(0) == len(members)).all()
    assert not (by_group[:, :, 0] == 1).all()  # the control: something is drawn
    again = np.concatenate(list(GroupDraws(y, groups, draws=200, seed=1).weights()))
    assert (drawn == again).all()


def delong(scores: np.ndarray, y: np.ndarray) -> "tuple[np.ndarray, np.ndarray]":
    """Components of the AUROC's variance (DeLong et al. 1988), by counting all pairs."""
    wins = (scores[y][:, None] > scores[~y]) + 0.5 * (scores[y][:, None] == scores[~y])
    return wins.mean(1), wins.mean(0)


def test_intervals_are_as_wide_as_delong_says_and_paired_differences_too() -> None:
    from subspace_probe.guard.group_draws import GroupDraws
    from subspace_probe.guard.ranked import AUROC, Ranked

    scores, y = sample(0, 500, ties=False)
    other = scores + np.random.default_rng(9).normal(size=500) * 0.5
    prompts = GroupDraws(y, np.arange(500), draws=2000)
    first, second = Ranked(scores, prompts), Ranked(other, prompts)
    parts, rest = delong(scores, y), delong(other, y)
    wide = 2 * 1.96 * np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    found = first.interval(AUROC)
    assert found.high - found.low == pytest.approx(wide, rel=0.1)
    paired = 2 * 1.96 * np.sqrt(sum((a - b).var(ddof=1) / len(a) for a, b in zip(parts, rest, strict=True)))
    gap, spread = first.above(second, AUROC)
    assert gap == pytest.approx(roc_auc_score(y, scores) - roc_auc_score(y, other))
    assert spread.high - spread.low == pytest.approx(paired, rel=0.1)
    assert paired < 0.7 * wide  # the control: unpaired, it would be far wider


def test_copies_of_prompts_are_no_evidence() -> None:
    from subspace_probe.guard.group_draws import GroupDraws
    from subspace_probe.guard.ranked import AUROC, Ranked

    scores, y = sample(4, 120, ties=False)
    many, often, whose = np.tile(scores, 5), np.tile(y, 5), np.tile(np.arange(120), 5)

    def width(prompts: "GroupDraws", values: np.ndarray) -> float:
        found = Ranked(values, prompts).interval(AUROC)
        return found.high - found.low

    once = width(GroupDraws(y, np.arange(120)), scores)
    assert width(GroupDraws(often, whose), many) == pytest.approx(once, rel=0.12)
    assert width(GroupDraws(often, np.arange(600)), many) < 0.6 * once  # the control: counted one by one


def test_perfect_and_nearly_perfect_figures_are_not_certain() -> None:
    from subspace_probe.guard.group_draws import GroupDraws
    from subspace_probe.guard.ranked import AUROC, Ranked, tpr_at
    from subspace_probe.linalg.resampling import wilson_interval

    y = np.arange(200) < 60
    scores = y + np.linspace(0, 0.5, 200)
    prompts = GroupDraws(y, np.arange(200))
    found = Ranked(scores, prompts).interval(AUROC)
    assert (found.low, found.high) == wilson_interval(60, 60)[1:]
    slip = scores.copy()
    slip[0] = 1.2  # one negative above a third of the positives
    slip[199] = 0.9999
    nearly = Ranked(slip, prompts)
    assert nearly.interval(AUROC).low <= found.low + 0.02
    gap, spread = nearly.above(Ranked(scores, prompts), AUROC)
    assert spread.low < gap < spread.high
    assert spread.high > 0
    recall = Ranked(scores, prompts).interval(tpr_at(0.01))
    assert recall.low == wilson_interval(60, 60)[1]
    few = Ranked(scores[56:64], GroupDraws(y[56:64], np.arange(8))).interval(AUROC)
    assert np.isnan(few.low)
    assert "4 groups" in few.of
