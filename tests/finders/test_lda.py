"""LDA against scikit-learn, and what it must not claim."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.planted import activations, planted


def _fit(x, labels, **settings):
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.lda import LDA

    return LDA(**settings).fit(activations(x, labels), Site(0))


def _judge(x, labels, shrinkage):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    judge = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.5, 0.5])
    return judge.fit(x.double().numpy(), labels.numpy())


@pytest.mark.parametrize(("n", "shrinkage"), [(400, 0.0), (400, 0.2), (40, 0.2), (40, 1.0)])
def test_direction_and_boundary_are_those_of_scikit_learn(n: int, shrinkage: float) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.covariances import factor_moments, shrunk_by
    from subspace_probe.finders.fitting import Fitting
    from subspace_probe.finders.lda import LDA, discriminant

    x, labels, _ = planted(n=n, shift=20.0)
    judge = _judge(x, labels, shrinkage)
    coef = judge.coef_[0]
    seen = factor_moments(Fitting(LDA(), activations(x, labels), Site(0)), labels, draws=0, seed=0)
    within = shrunk_by(shrinkage, seen.within, n)[0]
    weights = discriminant(within, seen.deviations[1] - seen.deviations[0], exact=shrinkage == 0).numpy()
    assert np.allclose(weights / np.linalg.norm(weights), coef / np.linalg.norm(coef), atol=1e-8)
    found = _fit(x, labels, shrinkage=shrinkage, null_draws=0)
    assert np.allclose(found.unit.numpy(), coef / np.linalg.norm(coef), atol=1e-6)
    scores = found.coords(x.double())[:, 0].numpy() * np.linalg.norm(coef)
    # the boundary too; float32 keeps the origin of rows around 20 to 1e-6 of that
    assert np.allclose(scores, judge.decision_function(x.double().numpy()), atol=1e-4 * np.abs(scores).max())
    assert float(found.scale[0]) == pytest.approx(
        float((x[labels == 1].double().mean(0) - x[labels == 0].double().mean(0)) @ found.unit.double()), rel=1e-5
    )


def test_estimated_shrinkage_is_oas_of_the_pooled_residuals() -> None:
    from sklearn.covariance import oas

    x, labels, _ = planted(n=60)
    residuals = x.double().clone()
    for label in (0, 1):
        residuals[labels == label] -= residuals[labels == label].mean(0)
    covariance, alpha = oas(residuals.numpy())
    gap = (x[labels == 1].double().mean(0) - x[labels == 0].double().mean(0)).numpy()
    expected = np.linalg.solve(covariance, gap)
    found = _fit(x, labels)
    assert found.notes["alpha"] == pytest.approx(alpha, rel=1e-8)
    assert np.allclose(found.unit.numpy(), expected / np.linalg.norm(expected), atol=1e-6)


def test_reads_better_than_the_mean_difference_and_points_elsewhere() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.linalg.ranking import auroc

    x, labels, _ = planted(n=2000, gap=0.6)
    held, held_labels, _ = planted(n=2000, gap=0.6, seed=7)
    _, _, unit = planted(n=2000, gap=0.6)
    held = held + 0.6 * held_labels[:, None] * (unit - planted(seed=7)[2])  # the same direction in new noise
    lda, plain = _fit(x, labels), MeanDifference(null_draws=0).fit(activations(x, labels), Site(0))
    assert auroc(lda.coords(held)[:, 0], held_labels) > auroc(plain.coords(held)[:, 0], held_labels) + 0.05
    assert lda.cosine(plain) < 0.8


@pytest.mark.slow
def test_found_holds_its_level_and_has_power_with_fewer_rows_than_coordinates() -> None:
    """The training separation would be perfect in every one of these."""
    false = sum(_fit(*planted(n=40, d=60, gap=0.0, seed=seed)[:2], null_draws=39).found for seed in range(30))
    true = sum(_fit(*planted(n=40, d=60, gap=6.0, seed=seed)[:2], null_draws=39).found for seed in range(10))
    assert false <= 5  # 1.5 of 30 expected; 6 or more has probability 0.003
    assert true == 10


def test_null_equals_refitting_under_each_permutation() -> None:
    """The trace of every draw against a naive one; row 0 is the data as they are."""
    from sklearn.covariance import oas

    from subspace_probe.core.sites import Site
    from subspace_probe.finders.covariances import factor_moments
    from subspace_probe.finders.fitting import Fitting
    from subspace_probe.finders.lda import LDA
    from subspace_probe.finders.permuting import permuted_codes

    x, labels, _ = planted(n=60, gap=1.0)
    acts = activations(x, labels)
    seen = factor_moments(Fitting(LDA(), acts, Site(0)), labels, draws=19, seed=5)
    metric = np.linalg.inv(oas(x.double().numpy())[0])
    for draw, trace in enumerate(seen.traces().tolist()):
        drawn = labels if draw == 0 else permuted_codes(acts, labels, seed=4 + draw)
        gap = (x[drawn == 1].double().mean(0) - x[drawn == 0].double().mean(0)).numpy()
        assert trace == pytest.approx(gap @ metric @ gap / 4, rel=1e-8)


def test_pairs_and_groups_are_respected() -> None:
    """Ten sources with a signature each, all their rows of one label: forty rows are ten pieces of evidence."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(10, 30, generator=generator)).repeat_interleave(8, 0)
    x = x + 0.1 * torch.randn(80, 30, generator=generator)
    labels = (torch.arange(80) // 8) % 2
    acts = activations(x, labels)
    sources = tuple((torch.arange(80) // 8).tolist())
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.lda import LDA

    alone = replace(acts, contrast=replace(acts.contrast, pairs=tuple(range(80)), groups=tuple(range(80))))
    grouped = replace(acts, contrast=replace(acts.contrast, pairs=tuple(range(80)), groups=sources))
    assert LDA().fit(alone, Site(0)).found  # control: rows taken for independent
    assert not LDA().fit(grouped, Site(0)).found


def test_rows_of_one_prompt_are_one_piece_of_evidence() -> None:
    """Ten prompts of thirty tokens each, all tokens of a prompt alike: labels move with prompts, not with tokens."""
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL
    from subspace_probe.finders.lda import LDA

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 20, generator=generator).repeat_interleave(30, 0)
    x = x + 0.1 * torch.randn(300, 20, generator=generator)
    prompts = activations(x[:10], torch.arange(10) % 2)
    alone = replace(prompts.contrast, pairs=tuple(range(10)), groups=tuple(range(10)))
    tokens = replace(
        prompts,
        rows=type(prompts.rows)({Site(0): x}),
        contrast=alone,
        prompt=torch.arange(300) // 30,
        position=torch.arange(300) % 30,
        where=ALL,
    )
    assert not LDA().fit(tokens, Site(0)).found
    many = activations(x, torch.arange(300) // 30 % 2)
    rows = tuple(range(300))
    assert LDA().fit(replace(many, contrast=replace(many.contrast, pairs=rows, groups=rows)), Site(0)).found  # control


def test_row_order_and_blocks_make_no_difference() -> None:
    x, labels, _ = planted(n=4200, d=12)  # two blocks of other rows
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    a, b = (_fit(x, labels, null_draws=0), _fit(x[order], labels[order], null_draws=0))
    assert torch.allclose(a.vector, b.vector, atol=1e-5)
    assert torch.allclose(a.origin, b.origin, atol=1e-5)


def test_memory_and_disk_make_no_difference(tmp_path: Path) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.lda import LDA
    from subspace_probe.store import open_activations, save_activations

    acts = activations(*planted(d=12)[:2])
    stored = open_activations(save_activations(acts, tmp_path / "acts"))
    memory, disk = (LDA(null_draws=19).fit(source, Site(0)) for source in (acts, stored))
    assert torch.equal(memory.vector, disk.vector)
    assert memory.notes == disk.notes


def test_nothing_to_find_and_bad_input() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, ShapeError

    same = _fit(torch.ones(20, 8), torch.arange(20) % 2)
    assert not same.found
    assert float(same.scale[0]) == 0.0
    x, labels, _ = planted(n=40)
    with pytest.raises(DataError, match="40 rows of width 48 and needs at least 50"):
        _fit(x, labels, shrinkage=0.0)
    with pytest.raises(DataError, match="no rows of label 1"):
        _fit(x, torch.zeros_like(labels))
    with pytest.raises(DataError, match="needs at least 2 of each class"):
        _fit(x[:3], labels[:3])
    with pytest.raises(ConfigError, match=r"shrinkage=1\.5"):
        _fit(x, labels, shrinkage=1.5)
    with pytest.raises(DataError, match="do not vary within their class"):
        _fit(torch.eye(2)[labels], labels)
    flat, many, _ = planted(n=400)
    flat[:, 5] = 1.0
    with pytest.raises(DataError, match="rank 47 of 48"):
        _fit(flat, many, shrinkage=0.0)
    x[17, 3] = float("nan")
    with pytest.raises(ShapeError, match=r"1 rows \(17\)"):
        _fit(x, labels)
