"""Sparse edits against a search over all subsets, and interpretations against sklearn's F1."""

from itertools import combinations

import pytest
import torch

from tests.dictionaries.small import dictionary, states


def test_greedy_edits_are_never_better_than_all_subsets_and_equal_them_at_one_and_at_all() -> None:
    from subspace_probe.dictionaries import sparse_edits

    sae = dictionary(6, 9, seed=3, bias=0.2)
    source, target = states(12, 6, seed=1), states(12, 6, seed=2)
    found = sparse_edits(sae, source, target, (1, 2, 9))
    moves = (sae.encode(target) - sae.encode(source))[..., None] * sae.decoder
    for row in range(12):
        left = {
            k: min(
                float((source[row] + moves[row, list(some)].sum(0) - target[row]).norm())
                for size in range(k + 1)
                for some in combinations(range(9), size)
            )
            for k in (1, 2)
        }
        got = {k: float((found[k].states[row] - target[row]).norm()) for k in found}
        assert got[1] == pytest.approx(left[1], abs=1e-5)
        assert left[2] - 1e-5 <= got[2] <= got[1] + 1e-6
        assert got[9] <= got[2] + 1e-6


def test_an_exact_dictionary_gives_the_target() -> None:
    """States made of two rows each: two features exchanged make one the other, and one feature does not."""
    from subspace_probe.dictionaries import feature_weights, sparse_edits

    eye = dictionary(8, 8, bias=0.0)
    weights = {**eye.weights, "W_enc": torch.eye(8), "W_dec": torch.eye(8)}
    eye = type(eye)(eye.configuration, weights)
    source, target = torch.eye(8)[:4] * 2 + torch.eye(8)[7], torch.eye(8)[[1, 2, 3, 0]] * 3 + torch.eye(8)[7]
    found = sparse_edits(eye, source, target, (1, 2))
    assert torch.allclose(found[2].states, target)
    assert not torch.allclose(found[1].states, target)
    assert torch.allclose(found[2].removed, torch.full((4,), 0.8, dtype=torch.float64))  # 2^2 of 2^2 + 1^2
    assert torch.allclose(feature_weights(eye, source).sum(1), torch.ones(4, dtype=torch.float64))


def test_a_step_that_leads_away_is_not_taken() -> None:
    from subspace_probe.core.errors import ConfigError, ShapeError
    from subspace_probe.dictionaries import sparse_edits

    sae, x = dictionary(6, 9, bias=0.2), states(5, 6)
    same = sparse_edits(sae, x, x, (3,))[3]
    assert torch.equal(same.states, x)
    assert bool((same.changed == -1).all())
    with pytest.raises(ConfigError, match="at least 1 feature"):
        sparse_edits(sae, x, x, ())
    with pytest.raises(ShapeError, match="Give pairs"):
        sparse_edits(sae, x, x[:2], (1,))


def test_f1_is_sklearns() -> None:
    from sklearn.metrics import f1_score

    from subspace_probe.dictionaries import f1_scores
    from subspace_probe.dictionaries.interpreting import f1_bound

    draw = torch.Generator().manual_seed(0)
    active, truth = torch.rand(80, 4, generator=draw) < 0.4, torch.rand(80, 3, generator=draw) < 0.3
    got = f1_scores(active, truth)
    for i in range(4):
        for j in range(3):
            assert float(got[i, j]) == pytest.approx(f1_score(truth[:, j].numpy(), active[:, i].numpy()))
            both = float((active[:, i] & truth[:, j]).sum())
            least = min(both / float(active[:, i].sum()), both / float(truth[:, j].sum()))
            assert least >= f1_bound(float(got[i, j])) - 1e-12


def test_planted_properties_are_named_and_noise_is_not() -> None:
    from subspace_probe.dictionaries import Property, interpret

    draw = torch.Generator().manual_seed(1)
    io, position = torch.randint(6, (400,), generator=draw), torch.randint(2, (400,), generator=draw)
    planted = [io == 3, torch.isin(io, torch.tensor([1, 4])), (io == 2) & (position == 1)]
    noise = torch.rand(400, generator=draw) < 0.1
    active = torch.stack([*planted, noise], 1)
    named = interpret(active[:300], {"io": io[:300], "position": position[:300]}, union=3)
    wanted = ((("io", (3,)),), (("io", (1, 4)),), (("io", (2,)), ("position", (1,))))
    assert [each.values for each in named.properties[:3]] == list(wanted)
    tested = named.score(active[300:], {"io": io[300:], "position": position[300:]})
    assert torch.equal(tested[:3], torch.ones(3, dtype=torch.float64))
    assert float(tested[3]) < 0.5
    assert str(Property(wanted[2])) == "io in {2} and position in {1}"
    # one value is the most that a union may join: the pair of values is no longer found
    assert float(interpret(active, {"io": io, "position": position}, union=1).f1[1]) < 0.9
