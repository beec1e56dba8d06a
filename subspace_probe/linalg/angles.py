"""How far apart directions and subspaces are; how far apart chance would put them is in `nulls`.

`cosine` is signed and between directions; `overlap` is unsigned and between subspaces. Results are float64 on the CPU.
Background: Knyazev & Argentati 2002, https://doi.org/10.1137/S1064827500377332 (accurate principal angles).
"""

# torch leaves its linear algebra untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from subspace_probe.linalg.bases import orthonormalise


def cosine(a: Float[Tensor, " d"], b: Float[Tensor, " d"]) -> float:
    """The signed cosine of the angle between two directions, computed in float64.

    Raises:
        ValueError: If either is zero or not finite, or the widths differ.

    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]))
    -1.0
    """
    _check_widths("cosine", a, b)
    return float(torch.clamp(_unit(a, "first") @ _unit(b, "second"), -1.0, 1.0))


def principal_angles(a: Float[Tensor, "k d"], b: Float[Tensor, "l d"]) -> Float64[Tensor, " min_k_l"]:
    """Principal angles between the row spans of `a` and `b`, in radians, smallest first.

    Cosines are the singular values of `A B^T`, sines those of `B - B A^T A` (b the smaller); `atan2` of the two is
    accurate at both ends, where the arc cosine alone loses every angle below 1e-8 (Knyazev & Argentati 2002).

    Args:
        a: `[k d]`, independent rows; they are orthonormalised again in float64.
        b: `[l d]`, likewise.

    Returns:
        `[min(k, l)]` float64, in [0, pi/2].

    Raises:
        ValueError: If rows are dependent or not finite, or the widths differ.
    """
    _check_widths("principal_angles", a, b)
    large, small = (_frame(a), _frame(b)) if a.shape[0] >= b.shape[0] else (_frame(b), _frame(a))
    inner = small @ large.T
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(small - inner @ large).flip(0)
    return torch.atan2(sines, cosines)


def overlap(a: Float[Tensor, "k d"], b: Float[Tensor, "l d"]) -> float:
    """Mean squared cosine of the principal angles over `min(k, l)`: 0 orthogonal, 1 one contains the other.

    Depends on the spans only, not on basis, sign or order. Compare it with `nulls.overlap_null`.

    Raises:
        ValueError: If rows are dependent or not finite, or the widths differ.

    >>> overlap(torch.eye(4)[:2], torch.eye(4)[1:3])
    0.5
    """
    _check_widths("overlap", a, b)
    return _mean_square(_frame(a), _frame(b))


def mode_subspace_overlap(a: Float[Tensor, "k d"], b: Float[Tensor, "l d"]) -> float:
    """`||A B^T||_F^2 / min(k, l)`: the mode subspace overlap (MSO) between orthonormal bases.

    The form the literature prints; equal to `overlap`, which also accepts bases that are not orthonormal. Both names
    stay so that a study can say what its paper says.

    Raises:
        ValueError: If a basis is not orthonormal to 1e-2, or the widths differ.
    """
    _check_widths("mode_subspace_overlap", a, b)
    for name, basis in (("first", a), ("second", b)):
        work = basis.detach().to("cpu", torch.float64)
        error = float((work @ work.T - torch.eye(len(work), dtype=torch.float64)).abs().max())
        if not error <= 1e-2:
            raise ValueError(
                f"mode_subspace_overlap needs orthonormal bases; the {name} is off by {error:.2g}. "
                "Pass it through orthonormalise, or use overlap."
            )
    return _mean_square(_frame(a), _frame(b))


def _mean_square(a: Tensor, b: Tensor) -> float:
    return min(1.0, float((a @ b.T).square().sum()) / min(len(a), len(b)))


def _frame(rows: Tensor) -> Tensor:
    if rows.shape[0] == 0:
        raise ValueError("An angle between subspaces was asked for; one has rank 0. Pass at least one row.")
    return orthonormalise(rows.detach().to("cpu", torch.float64), tolerance=1e-10)


def _unit(vector: Tensor, which: str) -> Tensor:
    work = vector.detach().to("cpu", torch.float64)
    peak = float(work.abs().max())
    if not 0.0 < peak < float("inf"):
        raise ValueError(
            f"cosine was asked for an angle between two directions; the {which} is zero or not finite. "
            "Check where it came from: an empty class or a dead site gives zero."
        )
    work = work / peak
    length = torch.linalg.vector_norm(work)
    return work / length


def _check_widths(asked: str, a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{asked} was given widths {a.shape[-1]} and {b.shape[-1]}; they must be equal. "
            "Compare at sites of one width."
        )
