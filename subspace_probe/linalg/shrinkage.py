"""Covariances that can be inverted: shrinkage towards a multiple of the identity, and products with the inverse.

From a covariance and a row count alone, so that both come from one streaming pass over rows of any number.
Background: Chen, Wiesel, Eldar & Hero 2010, https://arxiv.org/abs/0907.4698 (the oracle approximating shrinkage).
"""

# torch leaves its linear algebra untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from jaxtyping import Float
from torch import Tensor


def oas(covariance: Float[Tensor, "d d"], n: int) -> tuple[Float[Tensor, "d d"], float]:
    """The oracle approximating shrinkage of a covariance, and how much it shrank.

    Chen et al. 2010, eq. 23, in scikit-learn's form (`sklearn.covariance.oas`), which leaves out the terms of order
    2 / d. The amount does not depend on the covariance's unit, nor on whether it is divided by n or n - 1.

    Args:
        covariance: Symmetric, of rows about their mean.
        n: Number of rows behind it.

    Returns:
        `(shrunk, alpha)`: `[d d]` in the dtype of `covariance`, and the weight of the identity, in (0, 1].

    Raises:
        ValueError: If `n < 1` or the covariance is not square, symmetric and finite.

    >>> oas(torch.diag(torch.tensor([4.0, 0.0])), 9)[1]
    0.4
    """
    _check(covariance, "oas")
    if n < 1:
        raise ValueError(
            f"oas was asked to shrink a covariance of {n} rows; it takes at least one. Pass the row count."
        )
    work = covariance.double()
    d = len(work)
    square, mean_square = float(work.square().mean()), float(work.trace() / d) ** 2
    spread = (n + 1) * (square - mean_square / d)
    alpha = 1.0 if spread <= 0 else min(1.0, (square + mean_square) / spread)
    return shrunk(covariance, alpha), alpha


def shrunk(covariance: Float[Tensor, "d d"], alpha: float) -> Float[Tensor, "d d"]:
    """`(1 - alpha) S + alpha tr(S) / d I`: the trace stays, the eigenvalues move towards their mean.

    Args:
        covariance: Symmetric.
        alpha: 0 leaves it as it is, 1 gives the scaled identity.

    Raises:
        ValueError: If `alpha` is outside [0, 1] or the covariance is not square, symmetric and finite.

    >>> shrunk(torch.diag(torch.tensor([4.0, 0.0])), 0.5)
    tensor([[3., 0.],
            [0., 1.]])
    """
    _check(covariance, "shrunk")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"shrunk was asked for alpha={alpha}; it lies between 0 (nothing) and 1 (the identity).")
    out = covariance * (1 - alpha)
    out.diagonal().add_(alpha * covariance.trace() / len(covariance))
    return out


def inverse_times(covariance: Float[Tensor, "d d"], rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """`rows @ inverse(covariance)` in float64, by a Cholesky factor: for what was shrunk by more than nothing.

    Raises:
        ValueError: If the covariance is not positive definite.
    """
    _check(covariance, "inverse_times")
    factor, failed = torch.linalg.cholesky_ex(covariance.double())
    if int(failed):
        raise ValueError(
            f"inverse_times needs a positive definite covariance of width {len(covariance)}; this one is singular. "
            "Shrink it, or use pseudo_inverse_times."
        )
    return torch.cholesky_solve(rows.double().T, factor).T


def pseudo_inverse_times(
    covariance: Float[Tensor, "d d"], rows: Float[Tensor, "k d"], *, tolerance: float = 1e-10
) -> tuple[Float[Tensor, "k d"], int]:
    """`rows @ pinv(covariance)` in float64, and the rank that was inverted; costs an eigendecomposition.

    Args:
        covariance: Symmetric positive semi-definite, accumulated in float64.
        rows: `[k d]`.
        tolerance: Eigenvalues below `tolerance` times the largest count as zero.
    """
    _check(covariance, "pseudo_inverse_times")
    values, vectors = torch.linalg.eigh(covariance.double())
    kept = values > tolerance * values[-1].clamp(min=0)
    axes = vectors[:, kept]
    return (rows.double() @ axes / values[kept]) @ axes.T, int(kept.sum())


def _check(covariance: Tensor, asked: str) -> None:
    scale = float(covariance.abs().max()) if covariance.numel() else float("nan")
    square = covariance.shape[0] == covariance.shape[1]
    if not square or not scale < float("inf") or float((covariance - covariance.T).abs().max()) > 1e-4 * scale:
        raise ValueError(
            f"{asked} needs a square, symmetric, finite covariance; found shape {tuple(covariance.shape)} with largest "
            f"entry {scale:.3g}. Pass Moments.covariance()."
        )
