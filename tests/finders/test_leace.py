"""LEACE against the dense formula, and its guarantee against probes that know nothing of it, before and after."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.planted import activations, planted


def _fit(x, labels, *, factors=None, **settings):
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.leace import LEACE

    return LEACE(**settings).fit(activations(x, labels, **(factors or {})), Site(0))


def _three_values(n: int = 600, d: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.arange(n) % 3
    centres = 2 * torch.randn(3, d, generator=generator)
    return torch.randn(n, d, generator=generator) * torch.linspace(0.3, 2, d) + centres[values], values


def _dense(x: np.ndarray, values: np.ndarray, alpha: float = 0.0) -> np.ndarray:
    """The formula of Belrose et al., term by term: the projection W^+ P W."""
    hot = np.eye(values.max() + 1)[values]
    x, hot = x - x.mean(0), hot - hot.mean(0)
    sigma, cross = x.T @ x / len(x), x.T @ hot / len(x)
    sigma = (1 - alpha) * sigma + alpha * np.trace(sigma) / len(sigma) * np.eye(len(sigma))
    eigenvalues, vectors = np.linalg.eigh(sigma)
    kept = eigenvalues > 1e-10 * eigenvalues[-1]
    root = np.sqrt(eigenvalues[kept])
    white, back = vectors[:, kept] / root @ vectors[:, kept].T, vectors[:, kept] * root @ vectors[:, kept].T
    left, singular, _ = np.linalg.svd(white @ cross, full_matrices=False)
    left = left[:, singular > 1e-8 * singular[0]]
    return back @ left @ left.T @ white


def _auroc(x: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor) -> float:
    """A fresh probe's, on rows it has not seen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    probe = LogisticRegression(max_iter=5000).fit(x.numpy(), labels.numpy())
    return float(roc_auc_score(held_labels.numpy(), probe.decision_function(held.numpy())))


@pytest.mark.parametrize("n", [600, 12])  # more rows than coordinates, and fewer
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("many", [False, True])
def test_is_the_published_projection(n: int, alpha: float, many: bool) -> None:
    x, values = _three_values(n)
    values = values if many else (values > 0).long()
    settings = {"factor": "f", "shrinkage": alpha, "null_draws": 0}
    found = _fit(x, torch.arange(n) % 2, factors={"f": values}, **settings)
    expected = _dense(x.double().numpy(), values.numpy(), alpha)
    assert found.rank == (2 if many else 1)
    assert np.allclose((found.basis.T @ found.readers).numpy(), expected, atol=1e-5 * np.abs(expected).max())
    wanted = x.double().numpy() - (x.double().numpy() - x.double().numpy().mean(0)) @ expected.T
    assert np.allclose(found.reject(x.double()).numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("n", [600, 12])
@pytest.mark.parametrize("shrinkage", [0.0, "oas"])
def test_no_covariance_is_left_in_float64(n: int, shrinkage: float | str) -> None:
    """The theorem, to rounding, also where the covariance is singular or shrunk."""
    from subspace_probe.finders.covariances import shrunk_by
    from subspace_probe.finders.leace import oblique_reader
    from subspace_probe.finders.levels import principal_axes

    x, values = _three_values(n)
    x = x.double() - x.double().mean(0)
    shares = torch.bincount(values) / n
    means = torch.stack([x[values == v].mean(0) for v in range(3)])
    basis, _ = principal_axes(means, shares.double(), torch.arange(3), 1e-6)
    covariance, alpha = shrunk_by(shrinkage, torch.cov(x.T, correction=0), n)
    reader = oblique_reader(covariance, basis, exact=alpha == 0)
    hot = torch.nn.functional.one_hot(values).double()
    before = (x.T @ (hot - hot.mean(0)) / n).abs().max()
    after = x - x @ reader.T @ basis
    assert float(before) > 0.1  # control: there was something to erase
    assert float((after.T @ (hot - hot.mean(0)) / n).abs().max()) < 1e-10
    # and as stored, in float32
    stored = _fit(x.float(), torch.arange(n) % 2, factors={"f": values}, factor="f", shrinkage=shrinkage, null_draws=0)
    left = stored.reject(x).T @ (hot - hot.mean(0)) / n
    assert float(left.abs().max()) < 1e-5 * float(before)


def test_probes_read_before_and_nothing_after() -> None:
    from sklearn.linear_model import LinearRegression, LogisticRegression

    x, labels, unit = planted(n=2000)
    fresh, fresh_labels, other = planted(n=2000, seed=1)
    fresh = fresh + 3 * fresh_labels[:, None] * (unit - other)  # the same direction in new noise
    found = _fit(x, labels)
    x, fresh = x.double(), fresh.double()
    erased, held = found.reject(x), found.reject(fresh)
    assert _auroc(x, labels, fresh, fresh_labels) > 0.99
    assert abs(_auroc(erased, labels, held, fresh_labels) - 0.5) < 0.06
    y = labels.double().numpy()
    assert LinearRegression().fit(x.numpy(), y).score(x.numpy(), y) > 0.8
    assert LinearRegression().fit(erased.numpy(), y).score(erased.numpy(), y) < 1e-8
    probe = LogisticRegression(max_iter=5000, tol=1e-10).fit(erased.numpy(), labels.numpy())
    assert float(np.abs(probe.coef_).max()) < 1e-5  # the best probe is the constant
    # 48 weights fitted to 2000 rows explain 0.024 of nothing
    assert LinearRegression().fit(held.numpy(), fresh_labels.numpy()).score(held.numpy(), fresh_labels) < 0.1


def test_removing_the_probe_leaves_the_concept_in() -> None:
    """Control for the guarantee: projecting out a probe's weights, once and once more, is no erasure."""
    from sklearn.linear_model import LogisticRegression

    x, labels, _ = planted(n=2000, gap=4.0)
    x = x.double()
    for _ in range(2):
        weights = torch.from_numpy(LogisticRegression(max_iter=5000).fit(x.numpy(), labels.numpy()).coef_[0])
        x = x - torch.outer(x @ weights, weights) / weights.square().sum()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first, second = order[:1000], order[1000:]
    assert _auroc(x[first], labels[first], x[second], labels[second]) > 0.9


def test_changes_less_than_projecting_out_the_mean_difference() -> None:
    x, labels, _ = planted(n=2000)
    found = _fit(x, labels, shrinkage=0.0)
    x = x.double()
    centred, axis = x - x.mean(0), found.unit.double()
    plain = x - torch.outer(centred @ axis, axis)  # the orthogonal projection with the same guarantee
    moved = (found.reject(x) - x).square().sum(1).mean()
    assert float(moved) < 0.7 * float((plain - x).square().sum(1).mean())
    assert found.notes["variance_removed"] == pytest.approx(float(moved / centred.square().sum(1).mean()), rel=1e-4)
    # and less than other oblique projections with it: readers nearby cost more
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = torch.randn(x.shape[1], generator=generator, dtype=torch.float64) * 0.02
        reader = found.readers[0].double() + step - (step @ axis) * axis
        assert float(moved) < float(torch.outer(centred @ reader, axis).square().sum(1).mean())


def test_direction_and_coordinates_are_oriented() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.mean_difference import MeanDifference

    x, labels, _ = planted(shift=5.0)
    found, gap = _fit(x, labels), MeanDifference(null_draws=0).fit(activations(x, labels), Site(0))
    assert torch.allclose(found.vector, gap.vector, atol=1e-4)
    assert torch.allclose(_fit(x, 1 - labels).vector, -gap.vector, atol=1e-4)
    means = [found.coords(x.double())[labels == label].mean() for label in (0, 1)]
    assert float(means[1] - means[0]) == pytest.approx(float(gap.scale[0]), rel=1e-4)
    assert torch.allclose(found.reject(x.double()).mean(0), x.double().mean(0), atol=1e-4)  # the mean stays


@pytest.mark.slow
def test_found_holds_its_level_for_factors_too() -> None:
    false = true = 0
    for seed in range(30):
        x, values = _three_values(60, 20, seed)
        shuffled = values[torch.randperm(60, generator=torch.Generator().manual_seed(seed))]
        false += _fit(x, torch.arange(60) % 2, factors={"f": shuffled}, factor="f").found
        true += _fit(x, torch.arange(60) % 2, factors={"f": values}, factor="f").found
    assert false <= 5  # 1.5 expected; 6 or more has probability 0.003
    # pairs straddle the values, so that little can be exchanged; what can be is enough
    assert true == 30


def test_row_order_and_disk_make_no_difference(tmp_path: Path) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.leace import LEACE
    from subspace_probe.store import open_activations, save_activations

    x, values = _three_values(400, 12)
    labels = torch.arange(400) % 2
    finder, acts = LEACE("f", null_draws=19), activations(x, labels, f=values)
    memory, disk = (
        finder.fit(source, Site(0)) for source in (acts, open_activations(save_activations(acts, tmp_path / "a")))
    )
    assert torch.equal(memory.basis, disk.basis)
    assert torch.equal(memory.readers, disk.readers)
    assert memory.notes == disk.notes
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    other = _fit(x[order], labels[order], factors={"f": values[order]}, factor="f", null_draws=0)
    assert torch.allclose(memory.basis, other.basis, atol=1e-5)
    assert torch.allclose(memory.readers, other.readers, atol=1e-5)
    loaded = type(memory).load(memory.save(tmp_path / "s.safetensors"))
    assert torch.equal(loaded.reject(x), memory.reject(x))


def test_nothing_to_erase_and_bad_input() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, ShapeError, UnknownName

    same = _fit(torch.full((20, 8), 3.3), torch.arange(20) % 2)
    assert not same.found
    assert float(same.scale[0]) == 0.0
    x, labels, _ = planted(n=40)
    with pytest.raises(DataError, match="no rows of label 1"):
        _fit(x, torch.zeros_like(labels))
    with pytest.raises(DataError, match="one value 4 in all 40"):
        _fit(x, labels, factors={"f": torch.full((40,), 4)}, factor="f")
    with pytest.raises(UnknownName, match="'g'"):
        _fit(x, labels, factor="g")
    with pytest.raises(ConfigError, match="shrinkage=-1"):
        _fit(x, labels, shrinkage=-1.0)
    x[17, 3] = float("nan")
    with pytest.raises(ShapeError, match=r"1 rows \(17\)"):
        _fit(x, labels)
