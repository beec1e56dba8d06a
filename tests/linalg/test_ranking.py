"""AUROC against scikit-learn, its interval against simulated coverage."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from subspace_probe.linalg.ranking import auroc, auroc_interval


def two_classes(seed: int, n: int = 80, gap: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    return torch.randn(n, generator=generator) + gap * labels, labels


@pytest.mark.parametrize("decimals", [0, 1, 6])  # many ties, some, none
def test_auroc_is_scikit_learns(decimals: int) -> None:
    scores, labels = two_classes(0, n=301)
    scores = scores.round(decimals=decimals)
    expected = roc_auc_score(labels.numpy(), scores.numpy())
    assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)
    assert auroc(-scores, labels) == pytest.approx(1 - expected, abs=1e-12)
    assert auroc(scores, labels == 1) == auroc(scores, labels)
    if decimals == 0:  # control: counting strict wins only, the easy mistake, is wrong under ties
        wins = (scores[labels == 1][:, None] > scores[labels == 0]).double().mean()
        assert abs(float(wins) - expected) > 0.05


def test_auroc_takes_infinite_scores_and_refuses_the_rest() -> None:
    assert auroc(torch.tensor([-float("inf"), 0.0, float("inf")]), torch.tensor([0, 0, 1])) == 1.0
    with pytest.raises(ValueError, match=r"\(1 nan\)"):
        auroc(torch.tensor([float("nan"), 0.0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels with values \[1\]\. Select two classes"):
        auroc(torch.zeros(2), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"values \[-1, 1\]"):
        auroc(torch.zeros(2), torch.tensor([-1, 1]))


@pytest.mark.slow
def test_the_interval_is_the_percentile_bootstrap() -> None:
    scores, labels = two_classes(1)
    estimate, low, high = auroc_interval(scores, labels, draws=4000, seed=0)
    assert estimate == auroc(scores, labels)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(500):
        index = rng.integers(len(scores), size=len(scores))
        drawn.append(roc_auc_score(labels.numpy()[index], scores.numpy()[index]))
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


def test_the_interval_covers_the_population_value() -> None:
    truth = float(stats.norm.cdf(1 / 2**0.5))
    covered = 0
    for seed in range(100):
        _, low, high = auroc_interval(*two_classes(seed), draws=200, seed=seed)
        covered += low <= truth <= high
    assert 0.89 <= covered / 100 <= 0.99


def test_clusters_widen_the_interval() -> None:
    scores, labels = two_classes(2, n=40)
    copies, marks = scores.repeat_interleave(10), labels.repeat_interleave(10)
    clusters = torch.arange(40).repeat_interleave(10)
    alone = auroc_interval(scores, labels, seed=0)
    together = auroc_interval(copies, marks, clusters=clusters, seed=0)
    naive = auroc_interval(copies, marks, seed=0)
    assert together == pytest.approx(alone, abs=1e-12)  # ten copies of a row tell nothing new
    assert naive[2] - naive[1] < 0.5 * (alone[2] - alone[1])  # control


def test_a_class_that_is_nearly_absent_is_refused() -> None:
    scores, labels = two_classes(3, n=60)
    rare = torch.zeros(60, dtype=torch.long)
    rare[:5] = 1
    assert auroc_interval(scores, rare, seed=0)[0] == auroc(scores, rare)
    with pytest.raises(ValueError, match=r"samples of 56 clusters; \d+ hold one class only\. Add clusters"):
        auroc_interval(
            scores, rare, clusters=(torch.arange(60) - 4).clamp(min=0), seed=0
        )  # five positives, one cluster
    with pytest.raises(ValueError, match="a level lies between 0 and 1"):
        auroc_interval(scores, labels, level=1.5, seed=0)
