"""Applying a basis to data: coordinates, and the components inside and outside a subspace.

`basis` is `[k d]` with orthonormal rows and is not checked here (these run inside hooks): build it with
`bases.orthonormalise`. `x` may have any leading axes. The arithmetic is done in the wider of the two dtypes, at least
float32, and the result has the dtype of the first argument. Everything is out of place and differentiable.
Background: Strang, *Linear Algebra*, projections onto subspaces.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def coords(x: Float[Tensor, "*b d"], basis: Float[Tensor, "k d"]) -> Float[Tensor, "*b k"]:
    """Coordinates `x @ basis.T` of the rows of `x` along the basis, signed.

    Raises:
        ValueError: If the widths differ.

    >>> coords(torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 1.0]]))
    tensor([4.])
    """
    _check_width("coords", x, basis)
    work = _working(x, basis)
    return (x.to(work) @ basis.to(work).T).to(x.dtype)


def lift(c: Float[Tensor, "*b k"], basis: Float[Tensor, "k d"]) -> Float[Tensor, "*b d"]:
    """The vectors `c @ basis` with coordinates `c`: `coords(lift(c, basis), basis) == c`.

    Raises:
        ValueError: If `c` has another number of coordinates than the basis has rows.
    """
    if c.shape[-1] != basis.shape[0]:
        raise ValueError(
            f"lift was given {c.shape[-1]} coordinates; the basis has rank {basis.shape[0]}. Pass one per row."
        )
    work = _working(c, basis)
    return (c.to(work) @ basis.to(work)).to(c.dtype)


def project(
    x: Float[Tensor, "*b d"], basis: Float[Tensor, "k d"], origin: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "*b d"]:
    """The component of `x` inside the subspace, `P x`, or `P (x - origin)` where an origin is given.

    It is a displacement, so `project(x, b, o) + reject(x, b, o) == x` with and without an origin.

    Args:
        x: `[*b d]`.
        basis: `[k d]`, orthonormal rows.
        origin: The neutral point the component is measured from; the zero vector if not given.

    Returns:
        `[*b d]` in the dtype of `x`.

    Raises:
        ValueError: If the widths differ.
    """
    return _inside("project", x, basis, origin).to(x.dtype)


def reject(
    x: Float[Tensor, "*b d"], basis: Float[Tensor, "k d"], origin: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "*b d"]:
    """`x` minus its component inside the subspace: `x - P x`, or `x - P (x - origin)` where an origin is given.

    Without an origin the coordinates of the result are zero (directional ablation); with one they are those of the
    origin (mean ablation, when the origin is the mean).

    Args:
        x: `[*b d]`.
        basis: `[k d]`, orthonormal rows.
        origin: The neutral point; the zero vector if not given.

    Returns:
        `[*b d]` in the dtype of `x`.

    Raises:
        ValueError: If the widths differ.

    >>> reject(torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 1.0]]), torch.tensor([5.0, 1.0]))
    tensor([3., 1.])
    """
    inside = _inside("reject", x, basis, origin)
    return (x.to(inside.dtype) - inside).to(x.dtype)


def _inside(asked: str, x: Tensor, basis: Tensor, origin: Tensor | None) -> Tensor:
    """P (x - origin) in working precision, rounded once by the caller."""
    _check_width(asked, x, basis)
    work = _working(x, basis)
    b, shifted = basis.to(work), x.to(work)
    if origin is not None:
        if origin.shape != basis.shape[1:]:
            raise ValueError(
                f"{asked} was given an origin of shape {tuple(origin.shape)}; the basis has width {basis.shape[1]}. "
                f"Pass one point of shape ({basis.shape[1]},)."
            )
        shifted = shifted - origin.to(work)
    return (shifted @ b.T) @ b


def _working(x: Tensor, basis: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, basis.dtype), torch.float32)


def _check_width(asked: str, x: Tensor, basis: Tensor) -> None:
    if x.shape[-1] != basis.shape[1]:
        raise ValueError(
            f"{asked} was given vectors of width {x.shape[-1]}; the basis has width {basis.shape[1]}. "
            "Use a basis found at the same site of the same model."
        )
