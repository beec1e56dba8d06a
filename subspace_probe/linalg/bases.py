"""Bases of subspaces and random draws of them.

A basis is `[k d]` with orthonormal rows; row order and sign carry meaning.

Not a place for distances between subspaces (`angles`) or for applying a basis to data (`projections`).
Background: Mezzadri 2007, https://arxiv.org/abs/math-ph/0609050 (random frames by QR).
"""

# torch leaves its linear algebra untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from jaxtyping import Float
from torch import Tensor


def orthonormalise(vectors: Float[Tensor, "k d"], *, tolerance: float = 1e-6) -> Float[Tensor, "k d"]:
    """Orthonormal rows with the same span, row i being the new part of `vectors[i]` after the rows above it.

    Thin QR with the diagonal of R made positive (Gram-Schmidt in exact arithmetic), so `out[i] @ vectors[i] > 0`.

    Args:
        vectors: Rows to orthonormalise; their lengths do not matter.
        tolerance: Singular values of the unit-length rows below `tolerance` times the largest count as zero. Raise it
            for rows measured with noise, where near-copies should be refused.

    Returns:
        `[k d]` in the dtype of `vectors`; computed in float64 (float32 on devices without it).

    Raises:
        ValueError: If the rows are linearly dependent or not finite.

    >>> orthonormalise(torch.tensor([[-2.0, 0.0], [3.0, 1.0]]))
    tensor([[-1.,  0.],
            [ 0.,  1.]])
    """
    work = _unit_rows(vectors, tolerance, "orthonormalise")
    q, r = torch.linalg.qr(work.T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs).T.to(vectors.dtype)


def complement(basis: Float[Tensor, "k d"]) -> Float[Tensor, "d_minus_k d"]:
    """An orthonormal basis of everything orthogonal to the rows of `basis`; its own orientation is arbitrary.

    Args:
        basis: `[k d]`, linearly independent rows.

    Returns:
        `[d-k d]` in the dtype of `basis`; empty when `k == d`.

    Raises:
        ValueError: If the rows are linearly dependent or not finite.

    >>> complement(torch.eye(3)[:2]).abs()
    tensor([[0., 0., 1.]])
    """
    work = _unit_rows(basis, 1e-6, "complement")
    q = torch.linalg.qr(work.T, mode="complete")[0]
    return q[:, basis.shape[0] :].T.to(basis.dtype)


def random_subspace(k: int, d: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "k d"]:
    """A basis drawn from the uniform (Haar) distribution over orthonormal `[k d]` frames.

    The control "same rank, no relation to the data". QR with a positive diagonal is what makes it Haar (Mezzadri 2007).

    Raises:
        ValueError: If not `1 <= k <= d`.
    """
    if not 1 <= k <= d:
        raise ValueError(f"random_subspace was asked for rank {k} in {d} dimensions; ranks run from 1 to {d}. Lower k.")
    normal = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return orthonormalise(normal, tolerance=1e-14).to(dtype)


def random_directions(
    n: int,
    d: int,
    *,
    seed: int,
    norm: float | Float[Tensor, ""] | Float[Tensor, " n"] = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "n d"]:
    """Independent directions, uniform on the sphere of radius `norm` (one radius, or one per row).

    Args:
        n: How many.
        d: Width.
        seed: Seed of the local generator.
        norm: Length of each row; give the length of the direction under test for a matched control.
        dtype: Of the result; drawn in float64.

    Returns:
        `[n d]`, not orthogonal to each other.

    Raises:
        ValueError: If `n < 1` or `d < 1`.
    """
    _check_counts("random_directions", n, d)
    normal = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _with_norm(normal, norm).to(dtype)


def covariance_matched_directions(
    n: int, covariance: Float[Tensor, "d d"], *, seed: int, norm: float | Float[Tensor, ""] | Float[Tensor, " n"] = 1.0
) -> Float[Tensor, "n d"]:
    """Directions drawn from N(0, `covariance`), each then scaled to length `norm`.

    The stricter random control: activations are far from isotropic, and a direction drawn where they vary disturbs a
    network more than one drawn uniformly.

    Args:
        n: How many.
        covariance: Symmetric positive semi-definite; may be singular.
        seed: Seed of the local generator.
        norm: Length of each row, or one per row.

    Returns:
        `[n d]` in the dtype of `covariance`, inside its range.

    Raises:
        ValueError: If `covariance` is not symmetric, not positive semi-definite, zero or not finite.
    """
    _check_counts("covariance_matched_directions", n, covariance.shape[0])
    root = square_root(covariance)
    normal = torch.randn(n, root.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _with_norm(normal @ root.T, norm).to(covariance.device, covariance.dtype)


def off_identity(a: Tensor, b: Tensor) -> float:
    """Largest deviation of `a @ b.T` from the identity, in float64; infinite for unequal shapes."""
    if a.shape != b.shape:
        return float("inf")
    product = a.detach().to("cpu", torch.float64) @ b.detach().to("cpu", torch.float64).T
    return float((product - torch.eye(len(a), dtype=torch.float64)).abs().max())


def fix_sign(vector: Float[Tensor, " d"], reference: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """`vector` or `-vector`, whichever has a non-negative dot product with `reference` (unchanged if it is zero).

    >>> fix_sign(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.0]))
    tensor([ 1., -2.])
    """
    dot = vector.detach().double().cpu() @ reference.detach().double().cpu()
    return -vector if float(dot) < 0 else vector


def _unit_rows(vectors: Tensor, tolerance: float, asked: str) -> Tensor:
    """Rows at unit length in working precision, after checking that they are finite and independent."""
    k, d = vectors.shape
    finite = torch.isfinite(vectors).all(dim=1)
    if not bool(finite.all()):
        rows: list[int] = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{asked} was given {k} vectors; rows {rows} contain nan or inf. Drop them or find their source."
        )
    work = vectors.to(torch.float32 if vectors.device.type == "mps" else torch.float64)
    peak = work.detach().abs().amax(dim=1, keepdim=True)
    work = work / torch.where(peak > 0, peak, 1.0)
    length = torch.linalg.vector_norm(work, dim=1, keepdim=True)
    work = work / torch.where(length > 0, length, 1.0)
    if k == 0:
        return work
    singular = torch.linalg.svdvals(work.detach())
    rank = int((singular > tolerance * singular[0]).sum())
    if rank < k:
        raise ValueError(
            f"{asked} needs {k} linearly independent vectors of width {d}; found rank {rank}. "
            f"Keep {rank} of them, or lower the tolerance ({tolerance:g}) if the difference between rows is real."
        )
    return work


def square_root(covariance: Tensor) -> Tensor:
    """A float64 CPU factor F with F F^T = covariance."""
    work = covariance.detach().to("cpu", torch.float64)
    scale = float(work.abs().max())
    if not 0.0 < scale < float("inf"):
        raise ValueError(
            "covariance_matched_directions needs a covariance with some variance; this one is zero or not finite. "
            "Check that the rows it was computed from vary and are finite."
        )
    slack = 1e-3 if covariance.dtype in (torch.float16, torch.bfloat16) else 1e-5
    if float((work - work.T).abs().max()) > slack * scale:
        raise ValueError(
            "covariance_matched_directions needs a symmetric covariance; this matrix differs from its transpose. "
            "Pass Moments.covariance(), or (C + C.T) / 2."
        )
    values, vectors = torch.linalg.eigh((work + work.T) / 2)
    if float(values[0]) < -slack * work.shape[0] ** 0.5 * float(values.abs().max()):
        raise ValueError(
            f"covariance_matched_directions needs a positive semi-definite covariance; found eigenvalue "
            f"{float(values[0]):.3g}. Pass Moments.covariance(), not a difference of covariances."
        )
    return vectors * values.clamp(min=0).sqrt()


def _with_norm(rows: Tensor, norm: float | Tensor) -> Tensor:
    radius = torch.as_tensor(norm, dtype=torch.float64, device="cpu").reshape(-1, 1)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths * radius


def _check_counts(asked: str, n: int, d: int) -> None:
    if n < 1 or d < 1:
        raise ValueError(f"{asked} was asked for n={n} directions of width {d}; both must be at least 1. Raise them.")
