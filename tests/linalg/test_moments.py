"""Streaming moments against whole-data float64 NumPy, on data where uncentred sums fail."""

import inspect

import numpy as np
import pytest
import torch

from subspace_probe.linalg.moments import CHUNK_ROWS, Moments, class_moments


def hard_data(n: int = 6000, d: int = 12, mean: float = 3000.0, drift: float = 0.0) -> torch.Tensor:
    """Float32 rows of unit variance about a large common mean, correlated, optionally drifting."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing
    rows = rows + mean + drift * torch.linspace(0, 1, n, dtype=torch.float64)[:, None]
    return rows.float()


def relative(found: np.ndarray | torch.Tensor, expected: np.ndarray) -> float:
    deviations = np.sqrt(np.diag(expected))
    return float((np.abs(np.asarray(found) - expected) / np.outer(deviations, deviations)).max())


def stream(x: torch.Tensor, size: int) -> Moments:
    moments = Moments.empty(x.shape[1])
    for batch in x.split(size):
        moments = moments.update(batch)
    return moments


@pytest.mark.parametrize("drift", [0.0, 1000.0])
@pytest.mark.parametrize("size", [7, 500, 6000])
def test_covariance_is_exact_under_a_huge_common_mean(size: int, drift: float) -> None:
    x = hard_data(drift=drift)
    expected = np.cov(x.double().numpy(), rowvar=False)
    moments = stream(x, size)
    assert relative(moments.covariance(), expected) < 1e-9
    np.testing.assert_allclose(moments.variance, expected.diagonal(), rtol=1e-9)
    np.testing.assert_allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-14)
    assert relative(moments.covariance(ddof=0), expected) == pytest.approx(1 / len(x), rel=1e-2)
    assert moments.mean.dtype == moments.covariance().dtype == torch.float64
    # Control: sums of raw products in float32, the obvious way, are wrong.
    raw = x.T @ x / len(x) - torch.outer(x.mean(0), x.mean(0))
    assert relative(raw.double(), np.cov(x.double().numpy(), rowvar=False, ddof=0)) > (1e-4 if not drift else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_exact_to_its_own_values(dtype: torch.dtype) -> None:
    x = hard_data(mean=100.0).to(dtype)
    assert relative(stream(x, 1000).covariance(), np.cov(x.double().numpy(), rowvar=False)) < 1e-9


def test_batches_longer_than_a_chunk_and_single_rows() -> None:
    x = hard_data(n=CHUNK_ROWS + 3, d=3)
    expected = np.cov(x.double().numpy(), rowvar=False)
    assert relative(Moments.empty(3).update(x).covariance(), expected) < 1e-9
    assert relative(stream(x[:50], 1).covariance(), np.cov(x[:50].double().numpy(), rowvar=False)) < 1e-9


def test_update_returns_a_new_object_and_leaves_the_old() -> None:
    x = hard_data(n=20)
    empty = Moments.empty(12)
    first = empty.update(x)
    before = first.covariance().clone()
    second = first.update(x + 1)
    assert (empty.n, first.n, second.n) == (0, 20, 40)
    assert torch.equal(first.covariance(), before)
    assert first.update(x[:0]) is first
    leaf = x.clone().requires_grad_()
    assert not Moments.empty(12).update(leaf).mean.requires_grad


def test_means_only_costs_no_matrix_and_refuses_covariance() -> None:
    x = hard_data(n=100)
    moments = Moments.empty(12, second=False).update(x[:40]).merge(Moments.empty(12, second=False).update(x[40:]))
    assert moments.scatter is None
    np.testing.assert_allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-14)
    with pytest.raises(ValueError, match=r"covariance was asked for; only means were kept\. Build with"):
        moments.covariance()
    with pytest.raises(ValueError, match="width 12 without scatter and width 12 with scatter"):
        moments.merge(Moments.empty(12))


def test_bad_input_is_named() -> None:
    x = hard_data(n=30)
    x[3, 2], x[17, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"30 rows were asked for; 2 hold nan or inf: rows 3, 17\. Drop them"):
        Moments.empty(12).update(x)
    with pytest.raises(ValueError, match="rows of width 12; these moments have width 5"):
        Moments.empty(5).update(x)
    with pytest.raises(ValueError, match=r"ddof=1; there are 1 rows\. Add rows"):
        Moments.empty(12).update(x[:1]).covariance()
    with pytest.raises(ValueError, match="width 0"):
        Moments.empty(0)


def test_class_moments_are_the_moments_of_each_class() -> None:
    x = hard_data(n=900)
    labels = torch.arange(900) * 7 % 3 - 1
    batches = list(zip(x.split(128), labels.split(128), strict=True))
    found = class_moments(batches, 12, second=True)
    assert list(found) == [-1, 0, 1]
    for label, moments in found.items():
        own = x[labels == label].double().numpy()
        assert moments.n == len(own)
        np.testing.assert_allclose(moments.mean, own.mean(0), rtol=1e-14)
        assert relative(moments.covariance(), np.cov(own, rowvar=False)) < 1e-9
    assert class_moments(batches, 12)[0].scatter is None
    assert class_moments([], 12) == {}


def test_class_moments_refuse_batches_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="a batch of 3 rows with 2 labels"):
        inspect.unwrap(class_moments)([(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))], 2)
    x = torch.zeros(4, 2)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match="rows 2"):  # the row of the batch, not of its class
        class_moments([(x, torch.tensor([0, 0, 1, 1]))], 2)
