"""Pair accuracy against a loop over pairs; half pairs are refused."""

import pytest
import torch


def _contrast(labels, pairs):
    import subspace_probe as sp

    prompts = tuple(sp.Prompt(text=f"p {i}", answer="a", foil="b") for i in range(len(labels)))
    return sp.Contrast("c", prompts, tuple(labels), tuple(pairs))


def test_equals_a_loop_and_is_never_above_either_side() -> None:
    from subspace_probe.metrics.pairs import Pairs

    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    labels, names = [i % 2 for i in order], [i // 2 for i in order]
    right = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)) < 0.7
    pairs = Pairs.of(_contrast(labels, names))
    found = pairs.accuracy(right)
    assert found.shape == (3, 30)
    for row in range(3):
        by_pair: dict[int, list[bool]] = {}
        for name, hit in zip(names, right[row].tolist(), strict=True):
            by_pair.setdefault(name, []).append(hit)
        wanted = sum(all(hits) for hits in by_pair.values()) / len(by_pair)
        assert float(found[row].mean()) == pytest.approx(wanted)
        sides = [right[row][torch.tensor(labels) == label].double().mean() for label in (0, 1)]
        assert float(found[row].mean()) <= min(map(float, sides))
        assert float(found[row].mean()) < float(right[row].double().mean())  # the control: accuracy is another figure


def test_a_model_that_always_follows_the_context_scores_nothing() -> None:
    from subspace_probe.metrics.pairs import Pairs

    labels = [0, 1] * 20
    pairs = Pairs.of(_contrast(labels, [i // 2 for i in range(40)]))
    right = torch.tensor(labels, dtype=torch.float64)
    assert float(right.mean()) == 0.5
    assert float(pairs.accuracy(right).mean()) == 0.0


@pytest.mark.parametrize(
    ("labels", "names"), [([0, 1, 0], [0, 0, 1]), ([0, 1, 1], [0, 0, 0]), ([1, 1], [0, 0]), ([0, 1], [0, 1])]
)
def test_half_pairs_are_refused(labels: list[int], names: list[int]) -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.metrics.pairs import Pairs

    with pytest.raises(DataError, match="half a pair"):
        Pairs.of(_contrast(labels, names))


def test_exchanged_intents_halve_a_perfect_score() -> None:
    from subspace_probe.metrics.pairs import Pairs

    pairs = Pairs.of(_contrast([0, 1] * 50, [i // 2 for i in range(100)]))
    drawn = pairs.swapped(torch.ones(100), torch.zeros(100), draws=500, seed=0)
    # binomial: 50 coins a test
    assert float(drawn.mean()) == pytest.approx(0.5, abs=5 * 0.5 / (50 * 500) ** 0.5)
    assert float(drawn.std()) == pytest.approx(0.5 / 50**0.5, rel=0.2)


def test_memorisation_ratio() -> None:
    from subspace_probe.metrics.pairs import memorisation_ratio

    prior, context = torch.tensor([1.0, 0, 0, 0, 1]), torch.tensor([0.0, 1, 0, 0, 0])
    assert memorisation_ratio(prior, context) == pytest.approx(2 / 3)
    assert memorisation_ratio(torch.zeros(3), torch.zeros(3)) != memorisation_ratio(torch.zeros(3), torch.zeros(3))
