"""The mean difference against a naive whole-data computation, and the designs it must not be fooled by."""

import pytest
import torch

from tests.planted import activations, planted


def _fit(x, labels, *, paired=False, strata=None, **factors):
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.mean_difference import MeanDifference

    return MeanDifference(paired=paired, strata=strata, null_draws=19).fit(activations(x, labels, **factors), Site(0))


def test_equals_the_naive_difference_of_means_under_a_huge_common_mean() -> None:
    x, labels, _ = planted(shift=1e4)
    naive = x[labels == 1].double().mean(0) - x[labels == 0].double().mean(0)
    assert torch.allclose(_fit(x, labels).vector.double(), naive, atol=1e-5)


def test_paired_cancels_what_pairs_share() -> None:
    """Pairs share a large nuisance; half of the negatives lie in pairs without a positive and must not count."""
    x, labels, unit = planted(gap=4.0)
    shared = 50 * torch.randn(len(x) // 2, x.shape[1], generator=torch.Generator().manual_seed(3))
    x = x + shared.repeat_interleave(2, 0)
    broken = labels.clone()
    broken[:100] = 0  # the first fifty pairs have lost their positive
    complete = _fit(x, broken, paired=True)
    naive = (x[101::2].double() - x[100::2].double()).mean(0)
    assert torch.allclose(complete.vector.double(), naive, atol=1e-4)
    assert not torch.allclose(_fit(x, broken).vector.double(), naive, atol=1e-1)  # control: unpaired is thrown off
    assert torch.dot(complete.unit.double(), unit.double()) > 0.8


@pytest.mark.slow
def test_strata_keep_a_correlated_factor_out() -> None:
    """Two orthogonal axes, labels that agree in 90 %: the plain difference mixes them, the stratified one does not."""
    generator = torch.Generator().manual_seed(4)
    n, d = 4000, 16
    a = torch.arange(n) % 2
    b = torch.where(torch.rand(n, generator=generator) < 0.9, a, 1 - a)
    x = torch.randn(n, d, generator=generator)
    x[:, 0] += 4 * a
    x[:, 1] += 4 * b
    mixed, clean = _fit(x, a), _fit(x, a, strata="b", b=b)
    assert float(mixed.unit[1]) > 0.5  # 2r/(1+r^2) territory: the other axis leaks in
    assert abs(float(clean.unit[1])) < 0.05
    assert float(clean.unit[0]) > 0.99


def test_identical_states_give_no_direction() -> None:
    """Layer 0 of template tokens: every state is the same, and a unit vector would be noise."""
    found = _fit(torch.ones(20, 8), torch.arange(20) % 2)
    assert not found.found
    assert float(found.scale[0]) == 0.0
    assert float(found.vector.abs().max()) == 0.0


def test_paired_without_a_complete_pair_says_so() -> None:
    from subspace_probe.core.errors import ConfigError, DataError

    x, labels, _ = planted()
    same = torch.tensor([0, 0, 1, 1]).repeat(100)
    with pytest.raises(DataError, match="No pair has both"):
        _fit(x, same, paired=True)
    with pytest.raises(ConfigError, match="both paired and strata"):
        _fit(x, labels, paired=True, strata="f", f=labels)
