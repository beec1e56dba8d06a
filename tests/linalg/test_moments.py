"""Streaming moments against whole-data float64 NumPy, on data where uncentred sums fail.

Products of float32 rows are taken in float32: their covariance is held to 1e-6 of the coordinates' deviations, that of
float64 rows to 1e-9.
"""

import inspect

import numpy as np
import pytest
import torch

from subspace_probe.linalg.moments import CHUNK_ROWS, Moments, class_moments

SINGLE, DOUBLE = 1e-6, 1e-9


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
    assert relative(moments.covariance(), expected) < SINGLE
    np.testing.assert_allclose(moments.variance, expected.diagonal(), rtol=SINGLE)
    np.testing.assert_allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-14)
    assert relative(moments.covariance(ddof=0), expected) == pytest.approx(1 / len(x), rel=1e-2)
    assert moments.mean.dtype == moments.covariance().dtype == torch.float64
    # Control: sums of raw products in float32, the obvious way, are wrong.
    raw = x.T @ x / len(x) - torch.outer(x.mean(0), x.mean(0))
    assert relative(raw.double(), np.cov(x.double().numpy(), rowvar=False, ddof=0)) > (1e-4 if not drift else SINGLE)


@pytest.mark.parametrize("means", [[60.0, -25.0], [1000.0], [0.0]])
@pytest.mark.parametrize("order", ["shuffled", "sorted", "drifting"])
def test_float32_products_cost_no_more_than_their_own_rounding(means: list[float], order: str) -> None:
    """Whatever the common mean, and whether or not it is the same in every chunk of the stream."""
    generator = torch.Generator().manual_seed(1)
    n, d = 3 * CHUNK_ROWS + 1000, 32
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    for column, mean in enumerate(means * 2):
        x[:, column] += mean
    half = torch.arange(n) % 2 if order == "shuffled" else (torch.arange(n) > n // 2)
    x += 5.0 * half[:, None] if order != "drifting" else torch.linspace(0, 300, n, dtype=torch.float64)[:, None]
    x = x.float()
    wide = x.double().numpy()
    mean = wide.mean(0)
    two_pass = (wide - mean).T @ (wide - mean) / (n - 1)
    moments = stream(x, 2048)
    assert relative(moments.covariance(), two_pass) < SINGLE
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12, atol=1e-14 * np.abs(mean).max())
    # Control: one centre for the whole stream, as uncentred sums have (0), fails the same tolerance.
    if means != [0.0]:
        naive = (x.T @ x - n * torch.outer(x.mean(0), x.mean(0))) / (n - 1)
        assert relative(naive.double(), two_pass) > SINGLE


@pytest.mark.parametrize("share", [0.3, 0.003])
def test_rows_of_few_values_have_no_rounding_that_adds_up(share: float) -> None:
    generator = torch.Generator().manual_seed(2)
    n, d = 2 * CHUNK_ROWS, 16
    rows = (torch.rand(n, d, generator=generator) < share).float() * 3 + 7
    rows[::64] += 1024.0  # as the first token of every text may have
    expected = np.cov(rows.double().numpy(), rowvar=False)
    assert relative(stream(rows, 3000).covariance(), expected) < SINGLE
    positive = torch.randn(n, d, generator=generator).relu()
    expected = np.cov(positive.double().numpy(), rowvar=False)
    assert relative(stream(positive, 3000).covariance(), expected) < SINGLE
    # Control: about the mean itself, float32 products of zeros, all alike, are rounded all alike.
    centred = positive - positive.double().mean(0).float()
    assert relative((centred.T @ centred / (n - 1)).double(), expected) > relative(
        Moments.empty(d).update(positive).covariance(), expected
    )


def test_squares_outside_of_float32_are_taken_in_float64() -> None:
    x = hard_data(n=500, mean=0.0)
    x[:, 0] *= 1e25
    x[:, 1] *= 1e-25
    x[:, 2] = 7.0
    moments = stream(x, 100)
    expected = np.cov(x.double().numpy(), rowvar=False)
    np.testing.assert_allclose(moments.variance, expected.diagonal(), rtol=DOUBLE)
    assert moments.variance[2] == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_exact_to_its_own_values(dtype: torch.dtype) -> None:
    x = hard_data(mean=100.0).to(dtype)
    tolerance = DOUBLE if dtype == torch.float64 else SINGLE
    assert relative(stream(x, 1000).covariance(), np.cov(x.double().numpy(), rowvar=False)) < tolerance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_on_a_gpu(dtype: torch.dtype, precision: str) -> None:
    x = hard_data(n=CHUNK_ROWS + 100).to(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cuda"):
            moments = stream(x.cuda(), 3000)
    finally:
        torch.set_float32_matmul_precision(before)
    assert moments.mean.device.type == moments.covariance().device.type == "cpu"
    assert relative(moments.covariance(), np.cov(x.double().numpy(), rowvar=False)) < SINGLE


def test_batches_longer_than_a_chunk_and_single_rows() -> None:
    x = hard_data(n=CHUNK_ROWS + 3, d=3)
    expected = np.cov(x.double().numpy(), rowvar=False)
    assert relative(Moments.empty(3).update(x).covariance(), expected) < SINGLE
    assert relative(stream(x[:50], 1).covariance(), np.cov(x[:50].double().numpy(), rowvar=False)) < SINGLE


def test_update_returns_a_new_object_and_leaves_the_old() -> None:
    x = hard_data(n=20)
    empty = Moments.empty(12)
    first = empty.update(x)
    before = first.covariance().clone()
    second = first.update((x + 1).repeat(CHUNK_ROWS // 10, 1))  # more than one chunk, the later ones in place
    assert (empty.n, first.n, second.n) == (0, 20, 20 + 20 * (CHUNK_ROWS // 10))
    assert torch.equal(first.covariance(), before)
    assert first.update(x[:0]) is first
    merged, kept = first.merge(second), second.covariance().clone()
    merged.update(x)
    assert torch.equal(first.covariance(), before)
    assert torch.equal(second.covariance(), kept)
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
        assert relative(moments.covariance(), np.cov(own, rowvar=False)) < SINGLE
    assert class_moments(batches, 12)[0].scatter is None
    assert class_moments([], 12) == {}


def test_class_moments_refuse_batches_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="a batch of 3 rows with 2 labels"):
        inspect.unwrap(class_moments)([(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))], 2)
    x = torch.zeros(4, 2)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match="rows 2"):  # the row of the batch, not of its class
        class_moments([(x, torch.tensor([0, 0, 1, 1]))], 2)
