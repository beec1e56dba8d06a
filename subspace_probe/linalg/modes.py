"""The singular modes of a matrix, such as what tuning changed in one weight: all of them, or the leading ones.

Not a finder: it knows nothing of models or sites. Randomised decomposition: Halko, Martinsson & Tropp 2011,
arXiv:0909.4061.
"""

# torch leaves its linear algebra untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_WHOLE = 1024
"""Matrices whose smaller side is at most this are decomposed whole."""
_MORE = 16
"""Columns that a randomised decomposition takes beyond those it is asked for."""
_ROUNDS = 6
_EMPTY = 1e-6
"""Singular values below this share of the largest are rounding: float32 checkpoints have seven digits."""


@final
@dataclass(frozen=True, eq=False)
class Modes:
    """Leading singular triples of one matrix.

    Attributes:
        left: [k out], orthonormal rows in output space, the strongest first.
        singular: [k].
        right: [k in], orthonormal rows in input space.
        energy: squared Frobenius norm of the whole matrix.
    """

    left: Float64[Tensor, "k out"]
    singular: Float64[Tensor, " k"]
    right: Float64[Tensor, "k in"]
    energy: float

    @property
    def rank(self) -> int:
        """How many there are."""
        return len(self.singular)

    def holding(self, share: float) -> int:
        """The fewest leading modes that hold this share of the whole matrix's energy; all where they hold less.

        Raises:
            ValueError: a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"A share of {share} of the energy was asked for. Give one above 0 and at most 1.")
        held = self.singular.square().cumsum(0) / self.energy
        return min(self.rank, int((held < share - 1e-12).sum()) + 1)


def modes(matrix: Float[Tensor, "out in"], most: int | None = None, *, seed: int = 0) -> Modes | None:
    """The singular modes of a matrix, computed in float64; None where it is zero.

    Small matrices are decomposed whole. Of large ones, where at most a quarter of the modes is asked for, the leading
    ones come from a randomised decomposition with power iterations, which finds well separated ones to many digits and
    a flat tail only as a space that holds about as much.

    Args:
        matrix: [out in].
        most: keep at most so many; None for all that are not rounding.
        seed: of the random start, for large matrices.

    Raises:
        ValueError: a matrix that is not finite, or fewer than one mode asked for.

    >>> found = modes(torch.diag(torch.tensor([3.0, 4.0, 0.0])))
    >>> found.singular
    tensor([4., 3.], dtype=torch.float64)
    """
    if most is not None and most < 1:
        raise ValueError(f"{most} modes were asked for. Ask for at least one.")
    work = matrix.detach().to("cpu", torch.float64)
    energy = float(work.square().sum())
    if energy != energy or energy == float("inf"):
        raise ValueError("The modes of a matrix with nan or inf were asked for. Look at the checkpoint it came from.")
    if not energy:
        return None
    small = min(work.shape)
    if small <= _WHOLE or most is None or most + _MORE > small // 4:
        left, singular, right = torch.linalg.svd(work, full_matrices=False)
    else:
        left, singular, right = _leading(work, most + _MORE, seed)
    kept = min(int((singular > _EMPTY * singular[0]).sum()), small if most is None else most)
    return Modes(left.T[:kept].contiguous(), singular[:kept], right[:kept], energy)


def _leading(work: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomised subspace iteration (Halko et al. 2011, algorithm 4.4)."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(work @ torch.randn(work.shape[1], k, generator=generator, dtype=work.dtype))[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(work @ torch.linalg.qr(work.T @ basis)[0])[0]
    left, singular, right = torch.linalg.svd(basis.T @ work, full_matrices=False)
    return basis @ left, singular, right
