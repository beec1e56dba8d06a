"""A label or factor with any number of values: its codes, and the axes its means take."""

import torch
from jaxtyping import Float64, Int
from torch import Tensor


def coded(values: Int[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " n"]]:
    """The distinct values in ascending order, and for each row which of them it has, 0 .. m-1."""
    levels, codes = values.unique(return_inverse=True)
    return levels, codes


def principal_axes(
    deviations: Float64[Tensor, "m d"], shares: Float64[Tensor, " m"], levels: Int[Tensor, " m"], tolerance: float
) -> tuple[Float64[Tensor, "k d"], Float64[Tensor, " k"]]:
    """The axes along which the means of a factor's values lie, the widest first, with the range of the means on each.

    Two values have one axis, the difference of their means, and its length. Each axis points to where the values
    grow: the covariance of value and coordinate is positive.

    Args:
        deviations: each value's mean, less the mean of all rows.
        shares: how much of the data has each value; add up to one.
        levels: the values, ascending.
        tolerance: axes narrower than this fraction of the widest are left out.

    Returns:
        Orthonormal rows and their scale; no row at all where the means do not differ.
    """
    weighted = deviations * shares.sqrt()[:, None]
    _, singular, axes = torch.linalg.svd(weighted, full_matrices=False)
    axes = axes[(singular > tolerance * singular[0]) & (singular > 0)]
    at = deviations @ axes.T
    centred = (levels - (shares * levels).sum()) * shares
    lean = centred @ at
    # means that lie symmetrically, such as a V over three values, lean nowhere: the largest value decides
    lean = torch.where(lean.abs() > 1e-9 * at.abs().amax(dim=0), lean, at[-1])
    turn = torch.where(lean < 0, -1.0, 1.0).double()
    return axes * turn[:, None], at.amax(dim=0) - at.amin(dim=0)
