"""Linear maps that carry one cloud of points onto another: rotations of paired points, maps between Gaussians.

Both act on centred coordinates as `z @ map.T`; means are the caller's. Float64 throughout.
Background: Schönemann 1966, https://doi.org/10.1007/BF02289451 (Procrustes); Knott & Smith 1984,
https://doi.org/10.1007/BF00934745 (the optimal map between Gaussians).
"""

# torch leaves its linear algebra untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_SINGULAR = 1e-10
"""Eigenvalues and singular values below this share of the largest count as zero."""


def procrustes(source: Float[Tensor, "n k"], target: Float[Tensor, "_ _"]) -> Float64[Tensor, "k k"]:
    """The orthogonal matrix R, reflections included, with the least `|source @ R.T - target|` (Schönemann 1966).

    Args:
        source: Centred points, one a row.
        target: The point that each of them is paired with, centred.

    Returns:
        `[k k]`, on the CPU.

    Raises:
        ValueError: If the points are not finite, or do not determine R: fewer independent pairs than dimensions.

    >>> procrustes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
    tensor([[0., -1.],
            [1.,  0.]], dtype=torch.float64)
    """
    if source.shape != target.shape or not bool(source.isfinite().all() & target.isfinite().all()):
        raise ValueError(
            f"procrustes was given points of shapes {tuple(source.shape)} and {tuple(target.shape)}; they must be "
            "paired row by row and finite."
        )
    cross = target.detach().to("cpu", torch.float64).T @ source.detach().to("cpu", torch.float64)
    left, values, right = torch.linalg.svd(cross)
    rank = int((values > _SINGULAR * values[0]).sum())
    if rank < len(values):
        raise ValueError(
            f"procrustes was given {len(source)} pairs in {len(values)} dimensions, which vary together in {rank} of "
            "them only, so that the rotation is not determined. Add pairs, or use fewer dimensions."
        )
    return left @ right


def gaussian_map(source: Float[Tensor, "k k"], target: Float[Tensor, "k k"]) -> Float64[Tensor, "k k"]:
    """The symmetric T >= 0 with `T source T = target`: the map between centred Gaussians that moves points least.

    T = S^-1/2 (S^1/2 C S^1/2)^1/2 S^-1/2 for covariances S (source) and C (target) (Knott & Smith 1984). Among all
    maps that give the target's covariance it has the least mean squared displacement, the squared Bures distance
    tr(S) + tr(C) - 2 tr((S^1/2 C S^1/2)^1/2); `C^1/2 S^-1/2` is one of the others unless S and C commute.

    Args:
        source: Positive definite.
        target: Positive semi-definite; where it is singular, so is the map.

    Returns:
        `[k k]`, on the CPU.

    Raises:
        ValueError: If the source is singular (points without spread cannot be spread by a map), or a matrix is not
            symmetric, positive semi-definite and finite.

    >>> gaussian_map(torch.tensor([[4.0]]), torch.tensor([[9.0]]))
    tensor([[1.5000]], dtype=torch.float64)
    """
    values, axes = _spectrum(source, "source")
    rank = int((values > _SINGULAR * values[-1]).sum())
    if rank < len(values):
        raise ValueError(
            f"gaussian_map was given a source covariance of rank {rank} in {len(values)} dimensions. Shrink it "
            "(shrinkage.oas), or use only directions in which the source varies."
        )
    goal, goal_axes = _spectrum(target, "target")
    root = (axes * values.sqrt()) @ axes.T
    inverse = (axes / values.sqrt()) @ axes.T
    # the singular values of C^1/2 S^1/2, not the eigenvalues of its square, which would halve the digits
    _, middle, right = torch.linalg.svd((goal_axes * goal.sqrt()) @ goal_axes.T @ root)
    out = inverse @ (right.T * middle) @ right @ inverse
    return (out + out.T) / 2


def _spectrum(covariance: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending and clamped at zero, and eigenvectors, in float64."""
    work = covariance.detach().to("cpu", torch.float64)
    scale = float(work.abs().max()) if work.numel() else float("nan")
    square = work.ndim == 2 and work.shape[0] == work.shape[1]
    if not square or not scale < float("inf") or float((work - work.T).abs().max()) > 1e-4 * scale:
        raise ValueError(
            f"gaussian_map needs a square, symmetric, finite {name} covariance; found shape {tuple(work.shape)} with "
            f"largest entry {scale:.3g}. Pass Moments.covariance()."
        )
    values, axes = torch.linalg.eigh((work + work.T) / 2)
    if float(values[0]) < -1e-5 * scale * len(work) ** 0.5:
        raise ValueError(
            f"gaussian_map needs a positive semi-definite {name} covariance; found eigenvalue {float(values[0]):.3g}. "
            "Pass Moments.covariance(), not a difference of covariances."
        )
    return values.clamp(min=0), axes
