"""The logistic probe against scikit-learn on the same rows, and its cross-validation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.planted import activations, planted


def _fit(x, labels, **settings):
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.linear_probe import LinearProbe

    return LinearProbe(**settings).fit(activations(x, labels), Site(0))


@pytest.mark.parametrize("n", [300, 30])  # more rows than coordinates, and fewer: fitted in the span of the rows
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_direction_and_boundary_are_those_of_scikit_learn(n: int, standardise: bool, balanced: bool) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, labels, _ = planted(n=n, gap=1.5)
    keep = (labels == 0) | (torch.arange(n) % 3 > 0)  # classes of unequal size
    x, labels = x[keep], labels[keep]
    model = LogisticRegression(
        C=0.7, solver="newton-cg", tol=1e-10, max_iter=1000, class_weight="balanced" if balanced else None
    )
    judge = make_pipeline(StandardScaler(with_mean=standardise, with_std=standardise), model)
    judge.fit(x.double().numpy(), labels.numpy())
    scores = judge.decision_function(x.double().numpy())
    found = _fit(x, labels, c=0.7, standardise=standardise, balanced=balanced, null_draws=0)
    coef = model.coef_[0] / (judge[0].scale_ if standardise else 1.0)
    assert np.allclose(found.unit.numpy(), coef / np.linalg.norm(coef), atol=1e-5)
    assert np.allclose(found.coords(x.double())[:, 0] * np.linalg.norm(coef), scores, atol=1e-4)
    gap = x[labels == 1].double().mean(0) - x[labels == 0].double().mean(0)
    assert float(found.scale[0]) == pytest.approx(float(gap @ found.unit.double()), rel=1e-5)


def test_origin_is_the_point_of_the_boundary_nearest_the_midpoint() -> None:
    x, labels, _ = planted(shift=3.0)
    found = _fit(x, labels, null_draws=0)
    middle = (x[labels == 1].double().mean(0) + x[labels == 0].double().mean(0)) / 2
    offset = found.origin.double() - middle
    along = offset @ found.unit.double()
    assert torch.allclose(offset, along * found.unit.double(), atol=1e-5)  # no way about
    flipped = _fit(x, 1 - labels, null_draws=0)
    assert torch.allclose(flipped.unit, -found.unit, atol=1e-5)


def test_cross_validation_is_honest_where_training_separates_perfectly() -> None:
    x, labels, _ = planted(n=60, d=100, gap=0.0)
    noise = _fit(x, labels)
    coords = noise.coords(x)[:, 0]
    assert bool(((coords > 0) == (labels == 1)).all())  # the training rows look perfect
    assert 0.3 < noise.notes["cv_auroc"] < 0.7
    assert not noise.found
    x, labels, _ = planted(n=60, d=100, gap=12.0)
    signal = _fit(x, labels)
    assert signal.notes["cv_auroc"] > 0.9
    assert signal.notes["cv_accuracy"] > 0.8
    assert signal.found


def test_groups_stay_in_one_fold() -> None:
    """Eight copies of twelve prompts, labels without meaning: with copies in other folds all can be looked up."""
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.linear_probe import LinearProbe

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 40, generator=generator).repeat_interleave(8, 0)
    x = x + 0.05 * torch.randn(96, 40, generator=generator)
    source = torch.arange(96) // 8
    acts = activations(x, source % 2)
    alone = replace(acts, contrast=replace(acts.contrast, pairs=tuple(range(96)), groups=tuple(range(96))))
    grouped = replace(acts, contrast=replace(acts.contrast, pairs=tuple(range(96)), groups=tuple(source.tolist())))
    looked_up, honest = (LinearProbe().fit(a, Site(0)) for a in (alone, grouped))
    assert looked_up.notes["cv_auroc"] > 0.95  # control
    assert looked_up.found
    assert honest.notes["cv_auroc"] < 0.8
    assert not honest.found


def test_folds_keep_pairs_and_groups_and_deal_out_every_value() -> None:
    from subspace_probe.finders.folds import group_folds

    values = torch.tensor([0, 1] * 10 + [0] * 20)
    pairs = torch.arange(40) // 2
    groups = torch.cat([torch.arange(20) // 4, torch.arange(20, 40)])
    fold = group_folds(values, pairs, groups, most=4)
    assert sorted(set(fold.tolist())) == [0, 1, 2, 3]
    for column in (pairs, groups):
        for name in column.unique():
            assert len(fold[column == name].unique()) == 1
    for held in range(4):
        assert set(values[fold == held].tolist()) == {0, 1}
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(group_folds(values[order], pairs[order], groups[order], most=4), fold[order])
    assert group_folds(values, torch.zeros_like(pairs), groups, most=4).unique().tolist() == [0]  # one block
    assert int(group_folds(torch.tensor([0, 0, 0, 1, 1]), torch.arange(5), torch.arange(5), most=5).max()) == 1


def test_row_order_and_disk_make_no_difference(tmp_path: Path) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.linear_probe import LinearProbe
    from subspace_probe.store import open_activations, save_activations

    x, labels, _ = planted(n=300, d=12, gap=1.0)
    acts = activations(x, labels)
    stored = open_activations(save_activations(acts, tmp_path / "a"))
    memory, disk = (LinearProbe(null_draws=3).fit(source, Site(0)) for source in (acts, stored))
    assert torch.equal(memory.vector, disk.vector)
    assert memory.notes == disk.notes
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(memory.vector, _fit(x[order], labels[order], null_draws=0).vector, atol=1e-5)


def test_nothing_to_find_and_bad_input() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, ShapeError

    assert not _fit(torch.ones(20, 8), torch.arange(20) % 2).found
    x, labels, _ = planted(n=40)
    with pytest.raises(DataError, match="no rows of label 1"):
        _fit(x, torch.zeros_like(labels))
    with pytest.raises(DataError, match="needs at least 2 of each class"):
        _fit(x[:3], labels[:3])
    with pytest.raises(ConfigError, match=r"c=0\.0"):
        _fit(x, labels, c=0.0)
    few = _fit(x[:4], torch.tensor([0, 0, 1, 1]))  # two pairs, each of one class: no fold can be scored
    assert few.notes["cv_auroc"] is None
    assert not few.found
    x[17, 3] = float("nan")
    with pytest.raises(ShapeError, match=r"1 rows \(17\)"):
        _fit(x, labels)
