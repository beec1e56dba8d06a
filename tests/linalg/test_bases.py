"""Bases are orthonormal, oriented and spanning; random draws have the distribution they claim."""

import numpy as np
import pytest
import torch
from scipy import stats

from subspace_probe.linalg.bases import (
    complement,
    covariance_matched_directions,
    fix_sign,
    orthonormalise,
    random_directions,
    random_subspace,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gram_schmidt(rows: np.ndarray) -> np.ndarray:
    done: list[np.ndarray] = []
    for row in rows:
        for earlier in done:
            row = row - (row @ earlier) * earlier
        done.append(row / np.linalg.norm(row))
    return np.stack(done)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_orthonormalise_is_gram_schmidt(dtype: torch.dtype, tolerance: float) -> None:
    vectors = normal(5, 16, dtype=dtype)
    basis = orthonormalise(vectors)
    assert basis.dtype == dtype
    np.testing.assert_allclose(basis.double(), gram_schmidt(vectors.double().numpy()), atol=tolerance)
    # Control: LAPACK's own QR points some rows backwards, so the sign convention is not there by luck.
    q = torch.linalg.qr(vectors.double().T)[0].T
    assert ((q * vectors.double()).sum(1) < 0).any()
    assert ((basis.double() * vectors.double()).sum(1) > 0).all()


def test_orthonormalise_ignores_lengths_and_keeps_gradients() -> None:
    vectors = normal(3, 8)
    scales = torch.tensor([[1e-30], [1.0], [1e30]], dtype=torch.float64)
    torch.testing.assert_close(orthonormalise(vectors * scales), orthonormalise(vectors))
    leaf = vectors.clone().requires_grad_()
    assert torch.autograd.gradcheck(orthonormalise, (leaf,))


def test_orthonormalise_says_the_rank_it_found() -> None:
    vectors = normal(3, 8)
    dependent = torch.cat([vectors, vectors[:1] + 2 * vectors[1:2]])
    with pytest.raises(ValueError, match=r"4 linearly independent vectors of width 8; found rank 3\. Keep 3 of them"):
        orthonormalise(dependent)
    with pytest.raises(ValueError, match="found rank 8"):
        orthonormalise(normal(9, 8))
    with pytest.raises(ValueError, match="found rank 2"):
        orthonormalise(torch.cat([vectors[:2], torch.zeros(1, 8, dtype=torch.float64)]))
    with pytest.raises(ValueError, match=r"rows \[1\] contain nan or inf"):
        orthonormalise(torch.tensor([[1.0, 0.0], [float("nan"), 1.0]]))
    # Control: a real but small difference is accepted when the tolerance says so.
    near = torch.cat([vectors[:1], vectors[:1] + 1e-8 * vectors[1:2]])
    with pytest.raises(ValueError, match="found rank 1"):
        orthonormalise(near)
    assert orthonormalise(near, tolerance=1e-10).shape == (2, 8)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_complement_completes_the_space(k: int) -> None:
    basis = random_subspace(k, 8, seed=1, dtype=torch.float64)
    whole = torch.cat([basis, complement(basis)])
    torch.testing.assert_close(whole @ whole.T, torch.eye(8, dtype=torch.float64))


def test_complement_refuses_dependent_rows() -> None:
    with pytest.raises(ValueError, match="complement needs 2 linearly independent"):
        complement(torch.ones(2, 4))


def test_random_subspace_is_haar() -> None:
    d = 6
    frames = torch.stack([random_subspace(2, d, seed=seed, dtype=torch.float64) for seed in range(800)])
    torch.testing.assert_close(frames @ frames.mT, torch.eye(2, dtype=torch.float64).expand(800, 2, 2))
    # A Haar row is uniform on the sphere: each squared entry is Beta(1/2, (d-1)/2) and signs are fair.
    for entry in (frames[:, 0, 0], frames[:, 1, 3]):
        assert stats.kstest(entry.square().numpy(), stats.beta(0.5, (d - 1) / 2).cdf).pvalue > 1e-3
        assert abs(float((entry > 0).double().mean()) - 0.5) < 0.06
    # Control: without the sign fix the QR of Gaussians is not Haar (Mezzadri 2007): its diagonal has one sign.
    raw = torch.linalg.qr(normal(1500, d, 2))[0].mT[:, 0, 0]
    assert float((raw > 0).double().mean()) < 0.1
    assert torch.equal(random_subspace(2, d, seed=3), random_subspace(2, d, seed=3))
    assert random_subspace(2, d, seed=3).dtype == torch.float32


@pytest.mark.parametrize("k", [0, 5])
def test_random_subspace_refuses_impossible_ranks(k: int) -> None:
    with pytest.raises(ValueError, match=f"rank {k} in 4 dimensions"):
        random_subspace(k, 4, seed=0)


def test_random_directions_have_the_asked_norms() -> None:
    one = random_directions(4000, 5, seed=0, norm=2.5)
    torch.testing.assert_close(one.norm(dim=1), torch.full((4000,), 2.5))
    assert float(one.mean(0).norm()) < 5 * 2.5 / 4000**0.5
    each = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(random_directions(3, 5, seed=0, norm=each).norm(dim=1), each)
    torch.testing.assert_close(
        random_directions(3, 5, seed=0, norm=torch.tensor(4.0)).norm(dim=1), torch.full((3,), 4.0)
    )
    with pytest.raises(ValueError, match="n=0 directions"):
        random_directions(0, 5, seed=0)


def test_random_draws_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    random_directions(3, 5, seed=0)
    random_subspace(2, 5, seed=0)
    covariance_matched_directions(2, torch.eye(3), seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_covariance_matched_directions_follow_the_covariance() -> None:
    mixing = normal(3, 6)
    covariance = mixing.T @ mixing  # rank 3 of 6
    drawn = covariance_matched_directions(20000, covariance, seed=0, norm=1.0)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(20000, dtype=torch.float64))
    outside = complement(orthonormalise(mixing))
    assert float((drawn @ outside.T).abs().max()) < 1e-6
    # The unit vector z / |z| with z = F g has the second moment that NumPy's own sampler gives.
    sample = np.random.default_rng(0).multivariate_normal(np.zeros(6), covariance.numpy(), size=20000, method="eigh")
    sample /= np.linalg.norm(sample, axis=1, keepdims=True)
    expected = sample.T @ sample / 20000
    found = (drawn.T @ drawn / 20000).numpy()
    np.testing.assert_allclose(found, expected, atol=0.02)
    # Control: isotropic directions do not have it.
    isotropic = random_directions(20000, 6, seed=0, dtype=torch.float64)
    assert np.abs((isotropic.T @ isotropic / 20000).numpy() - expected).max() > 0.1


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.zeros(3, 3), "zero or not finite"),
        (torch.full((3, 3), float("nan")), "zero or not finite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "differs from its transpose"),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "found eigenvalue -1"),
    ],
)
def test_covariance_matched_directions_refuse_other_matrices(covariance: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        covariance_matched_directions(2, covariance, seed=0)


def test_fix_sign_agrees_with_the_reference() -> None:
    vector, reference = normal(8), normal(8, seed=1)
    for candidate in (vector, -vector):
        assert float(fix_sign(candidate, reference) @ reference) > 0
    assert torch.equal(fix_sign(vector, torch.zeros(8, dtype=torch.float64)), vector)
