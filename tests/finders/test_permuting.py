"""Permuted labels: the null is one whatever joins the prompts, and leaves power where there is any."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.planted import activations


def designed(x: Tensor, labels: Tensor, *, groups: Tensor, pairs: Tensor | None = None, **factors: Tensor) -> Any:
    acts = activations(x, labels, **factors)
    own = torch.arange(len(x)) if pairs is None else pairs
    return replace(acts, contrast=replace(acts.contrast, pairs=tuple(own.tolist()), groups=tuple(groups.tolist())))


def share_found(data: Any, finder: Any, n: int = 40) -> float:
    from subspace_probe.core.sites import Site

    return sum(finder.fit(data(seed), Site(0)).found for seed in range(n)) / n


def one_mixed_group(seed: int, shift: float = 0.0) -> Any:
    """Twenty groups of four, each with a state of its own and one label, but for one row."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(80) // 4
    labels = groups % 2
    labels[0] = 1 - labels[0]
    x = torch.randn(20, 16, generator=generator)[groups] + 0.3 * torch.randn(80, 16, generator=generator)
    x[labels == 1, 0] += shift
    return designed(x, labels, groups=groups)


def scenarios_under_two_framings(seed: int) -> Any:
    """Sixteen scenarios of one label each, shown twice; one of them once."""
    generator = torch.Generator().manual_seed(seed)
    effects = 2 * torch.randn(16, 16, generator=generator)
    cells = torch.tensor([(k, f) for k in range(16) for f in (0, 1) if (k, f) != (3, 1)])
    x = effects[cells[:, 0]] + 0.3 * torch.randn(len(cells), 16, generator=generator)
    return designed(x, cells[:, 0] % 2, groups=cells[:, 0], framing=cells[:, 1])


def pairs_in_groups(seed: int) -> Any:
    """Eight pairs in each of six groups, whose difference belongs to the group."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.arange(48).repeat_interleave(2)
    labels = torch.arange(96) % 2
    effects = torch.randn(6, 16, generator=generator)
    x = torch.randn(96, 16, generator=generator) + (2 * labels[:, None] - 1) * effects[pairs // 8]
    return designed(x, labels, groups=pairs // 8, pairs=pairs)


def tokens_of_mixed_groups(seed: int) -> Any:
    """Forty prompts in ten groups, ten tokens of each: tokens share their prompt's state and are no evidence."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.arange(40)
    labels = prompts[torch.randperm(40, generator=generator)] % 2
    acts = designed(torch.randn(40, 16, generator=generator), labels, groups=prompts // 4)
    rows = prompts.repeat_interleave(10)
    from subspace_probe.core.activations import MemoryRows

    tensors = {s: acts.at(s)[rows] + 0.3 * torch.randn(400, 16, generator=generator) for s in acts.sites}
    return replace(acts, rows=MemoryRows(tensors), prompt=rows, position=torch.arange(400) % 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (one_mixed_group, {}),
        (scenarios_under_two_framings, {"strata": "framing"}),
        (pairs_in_groups, {"paired": True}),
        (tokens_of_mixed_groups, {}),
    ],
)
def test_nothing_is_found_where_sources_and_not_labels_differ(data: Any, settings: dict[str, Any]) -> None:
    from subspace_probe.finders.mean_difference import MeanDifference

    assert share_found(data, MeanDifference(null_draws=39, **settings)) <= 0.175  # 2 of 40 expected, 8 or more: 1e-3
    # control: every row a source of its own, it is found half the time or always
    alone = lambda seed: _alone(data(seed))  # noqa: E731
    if data is not tokens_of_mixed_groups:
        assert share_found(alone, MeanDifference(null_draws=39, **{**settings, "paired": False}), n=10) >= 0.4


def _alone(acts: Any) -> Any:
    own = tuple(range(len(acts.contrast)))
    return replace(acts, contrast=replace(acts.contrast, pairs=own, groups=own))


def test_one_mixed_group_takes_no_power() -> None:
    from subspace_probe.finders.lda import LDA
    from subspace_probe.finders.mean_difference import MeanDifference

    for finder in (MeanDifference(null_draws=39), LDA(null_draws=39)):
        assert share_found(lambda seed: one_mixed_group(seed, 6.0), finder, n=10) == 1.0


def test_what_may_be_exchanged() -> None:
    from subspace_probe.finders.permuting import exchanged

    n = 80
    own, pairs = torch.arange(n), torch.arange(n) // 2
    labels = own % 2
    draws = torch.stack([exchanged(labels, pairs, own, seed=seed) for seed in range(50)])
    assert (draws.view(50, -1, 2).sum(2) == 1).all()  # within pairs
    assert 0.4 < float((draws != labels).float().mean()) < 0.6
    draws = torch.stack([exchanged(labels, own, own, seed=seed) for seed in range(50)])
    assert (draws.sum(1) == n // 2).all()
    assert not (draws.view(50, -1, 2).sum(2) == 1).all()  # control: without pairs, across them
    framing = own % 2
    by_scenario = (pairs % 2).clone()
    draws = torch.stack([exchanged(by_scenario, own, pairs, strata=framing, seed=seed) for seed in range(50)])
    assert (draws.view(50, -1, 2)[..., 0] == draws.view(50, -1, 2)[..., 1]).all()  # scenarios as a whole
    assert all((draws[:, framing == f].sum(1) == n // 4).all() for f in (0, 1))


def test_a_design_that_cannot_be_tested_says_so() -> None:
    from subspace_probe.core.errors import SmallSampleWarning
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.mean_difference import MeanDifference

    x, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    x[labels == 1] += 20
    few = designed(x, labels, groups=torch.arange(8), pairs=torch.arange(8) // 2)
    with pytest.warns(SmallSampleWarning, match="could not be tested: 1[0-9] labellings are all"):
        assert not MeanDifference().fit(few, Site(0)).found
    many = designed(x, labels, groups=torch.arange(8))
    with pytest.warns(SmallSampleWarning, match="9 draws were asked for"):
        MeanDifference(null_draws=9).fit(many, Site(0))
