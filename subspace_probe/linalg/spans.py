"""The span of vectors that may be nearly dependent: singular value decomposition with a tolerance.

Decoder rows of a dictionary are often near-copies of each other. QR makes an axis of every small difference between
them; here directions that the vectors hardly reach are left out, and it is said how many and how far the rest reach.
Golub & Van Loan, *Matrix Computations*, section 5.5 (numerical rank).
"""

# torch leaves its linear algebra untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Span:
    """What a set of vectors spans.

    Attributes:
        basis: orthonormal rows, the directions that the vectors share most first, shape [k, d].
        singular: singular values of the vectors at unit length, all of them, largest first, shape [m].
        n: vectors that it was taken of.
    """

    basis: Float[Tensor, "k d"]
    singular: Float64[Tensor, " m"]
    n: int

    @property
    def rank(self) -> int:
        """Directions that were kept."""
        return self.basis.shape[0]

    @property
    def condition(self) -> float:
        """Largest singular value over the smallest, before any was left out; infinite for dependent vectors."""
        smallest = float(self.singular[-1])
        return float(self.singular[0]) / smallest if smallest > 0 else float("inf")


def span_of(vectors: Float[Tensor, "n d"], *, tolerance: float = 0.05) -> Span:
    """An orthonormal basis of what vectors span, without the directions that they hardly reach.

    Args:
        vectors: rows; their lengths do not matter, rows of zeros are left out.
        tolerance: singular values below `tolerance` times the largest are left out. Raise it where rows are estimates.

    Returns:
        The span, its basis in the dtype of `vectors`; computed in float64.

    Raises:
        ValueError: rows that are not finite or all zero, or a tolerance outside [0, 1).

    >>> span_of(torch.tensor([[2.0, 0.0], [2.0, 1e-3]])).rank
    1
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"span_of was given tolerance={tolerance}. It is a share of the largest singular value.")
    work = vectors.detach().to("cpu", torch.float64)
    if not bool(work.isfinite().all()):
        raise ValueError(
            f"span_of was given {len(work)} vectors, some with nan or inf. Drop them or find their source."
        )
    peak = work.abs().amax(dim=1, keepdim=True)
    work = (work / torch.where(peak > 0, peak, 1.0))[peak[:, 0] > 0]
    if not len(work):
        raise ValueError(f"span_of was given {len(vectors)} vectors and none that is not zero. They span nothing.")
    work = work / torch.linalg.vector_norm(work, dim=1, keepdim=True)
    _, singular, rows = torch.linalg.svd(work, full_matrices=False)
    # rounding alone leaves this much of a direction that is not there
    floor = max(tolerance, max(work.shape) * torch.finfo(torch.float64).eps)
    kept = singular > floor * singular[0]
    return Span(rows[kept].to(vectors.device, vectors.dtype), singular, len(vectors))
