"""A patch within one direction as an edit of the weight that reads it, and back.

Both change what a weight writes by a multiple of one vector: `weight @ (h + c v)` and `(weight + a b^T) @ h`. Computed
in float64 on the CPU.
Background: Makelov, Lange & Nanda 2023, arXiv:2311.17030; Meng et al. 2022, arXiv:2202.05262 (the edit).
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
class RankOneEdit:
    """A change `weight + write read^T` of a weight that reads states."""

    write: Float64[Tensor, " out"]
    read: Float64[Tensor, " d"]
    spill: float
    """read^T S read, the mean of (read . h)^2 over the states: how much it acts where it was not meant to."""

    def applied(self, weight: Float[Tensor, "out d"]) -> Float[Tensor, "out d"]:
        """The edited weight, in the dtype of the weight given."""
        return (_wide(weight) + torch.outer(self.write, self.read)).to(weight.device, weight.dtype)


def edit_of_patch(
    weight: Float[Tensor, "out d"],
    key: Float[Tensor, " d"],
    second_moment: Float[Tensor, "d d"],
    direction: Float[Tensor, " d"],
    amount: float,
) -> RankOneEdit:
    """The edit of a weight that does at one state what a patch of rank one does, and least at all others.

    The patch gives `weight @ (key + amount direction)`. So does any `weight + a b^T` with a = amount weight direction
    and b.key = 1; among those b = S^-1 key / (key^T S^-1 key) has the least b^T S b, namely 1 / (key^T S^-1 key). The
    form of Meng et al. 2022, arXiv:2202.05262, eq. 2. Unlike the patch, an edit acts at every token.

    Args:
        weight: What reads the state.
        key: The state at which both agree.
        second_moment: S, the uncentred mean of h h^T over states; positive definite.
        direction: v, a unit vector.
        amount: v.D, how far the patch moves along it.

    Raises:
        ValueError: If shapes do not fit, S is not positive definite, or the key is zero.
    """
    w, k, v = _wide(weight), _wide(key), _wide(direction)
    factor = _cholesky("edit_of_patch", second_moment, w.shape[1])
    solved = torch.cholesky_solve(k[:, None], factor)[:, 0]
    norm = float(k @ solved)
    if not norm > 0.0:
        raise ValueError(
            "edit_of_patch was given a key that is zero or not finite. Pass the state at the edited token."
        )
    return RankOneEdit(amount * (w @ v), solved / norm, 1.0 / norm)


@final
@dataclass(frozen=True, eq=False)
class AblationVector:
    """The ablation `h -> h - (vector . h) vector` that stands for an edit of rank one."""

    vector: Float64[Tensor, " d"]
    """Of unit length (so that the ablation is a projection) only for particular strengths."""
    mismatch: float
    """Mean over states of (strength^(1/2) vector . h + read . h)^2: its distance to the edit, in units of |write|."""


def patch_of_edit(
    weight: Float[Tensor, "out d"],
    edit: RankOneEdit,
    second_moment: Float[Tensor, "d d"],
    strength: float,
) -> AblationVector:
    """The directional ablation in front of a weight that comes nearest to an edit of the weight.

    The edit adds a (b.h) to the output, the ablation -(v.h) weight v. With v = beta^(1/2) u and weight u = a their mean
    squared distance is |a|^2 (beta u + b)^T S (beta u + b), least at u = -b/beta - S^-1 weight^T l, with l such that
    weight u = a. (A coefficient of 2/beta, which is in circulation, is not the minimum.)

    Args:
        weight: What reads the state.
        edit: a (`write`) and b (`read`).
        second_moment: S, the uncentred mean of h h^T over states; positive definite.
        strength: beta > 0.

    Raises:
        ValueError: If shapes do not fit, S is not positive definite, `strength` is not positive, or the edit writes
            something that the weight cannot write.
    """
    if not 0.0 < strength < float("inf"):
        raise ValueError(f"patch_of_edit was given strength={strength}. It is positive: change it.")
    w, a, b = _wide(weight), edit.write, edit.read
    factor = _cholesky("patch_of_edit", second_moment, w.shape[1])
    spread = torch.cholesky_solve(w.T, factor)  # S^-1 W^T
    missing = a + w @ b / strength
    solved = torch.linalg.pinv(w @ spread, rtol=1e-10, hermitian=True) @ missing
    u = spread @ solved - b / strength
    if float((w @ u - a).norm()) > 1e-6 * float(a.norm()):
        raise ValueError("patch_of_edit was given an edit that writes what the weight cannot. Edit within its range.")
    off = strength * u + b
    return AblationVector(strength**0.5 * u, float(off @ _wide(second_moment) @ off))


def _wide(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _cholesky(asked: str, second_moment: Tensor, d: int) -> Tensor:
    """The lower factor of a positive definite matrix of width d."""
    factor, failed = torch.linalg.cholesky_ex(_wide(second_moment)) if second_moment.shape == (d, d) else (None, 1)
    if factor is None or int(failed):
        raise ValueError(
            f"{asked} needs a positive definite second moment of width {d}; found shape {tuple(second_moment.shape)}, "
            "perhaps singular. Take it over more states than coordinates, or add a little to its diagonal."
        )
    return factor
