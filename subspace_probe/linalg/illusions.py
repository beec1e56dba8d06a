"""Closed forms behind the illusion checks: what a patch within a subspace can do, and what its reader can see of it.

Notation: D is the difference of source and base state, G the gradient of the metric by the state at the base. To first
order a patch within a unit direction v changes the metric by (v.D)(v.G), and one of the whole state by D.G.
Computed in float64 on the CPU; nothing here is differentiable.
Background: Makelov, Lange & Nanda 2023, arXiv:2311.17030 (the illusion, the split of a direction by its reader); Wu
et al. 2024, arXiv:2401.12631 (what the split does not show).
"""

# torch leaves its linear algebra untyped and scipy ships no stubs; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64
from scipy.special import betaincinv
from torch import Tensor

from subspace_probe.linalg.bases import off_identity


# ---------------------------------------------------------------------------------------------- what a patch can do
def capacity(difference: Float[Tensor, "n d"], gradient: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """How much more the best patch of rank one does than that of the whole state, to first order: (|D||G| - D.G) / 2.

    The greatest (v.D)(v.G) over unit v is (|D||G| + D.G) / 2, the larger eigenvalue of (D G^T + G D^T) / 2; the whole
    state does D.G. Their difference is never negative: where it is large, a patch of rank one has an effect whatever
    the state's own role is.

    Args:
        difference: D, one pair a row.
        gradient: G, of the metric in the direction that counts as an effect.

    Returns:
        One number a pair, in units of the metric.

    Raises:
        ValueError: If the shapes differ or a number is not finite.

    >>> capacity(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor([1.])
    """
    d, g = _pairs("capacity", difference, gradient)
    room = (d.norm(dim=1) * g.norm(dim=1) - (d * g).sum(1)) / 2
    return room.clamp(min=0).to(difference.device, difference.dtype)


def bisector(difference: Float[Tensor, "n d"], gradient: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The unit direction of each pair whose patch does most to first order: v along D/|D| + G/|G|.

    Args:
        difference: D, one pair a row.
        gradient: G.

    Returns:
        Unit rows; zero where no direction does more than none (D and G opposite, or one of them zero).

    Raises:
        ValueError: If the shapes differ or a number is not finite.

    >>> bisector(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor([[0.7071, 0.7071]])
    """
    d, g = _pairs("bisector", difference, gradient)
    lengths = d.norm(dim=1, keepdim=True), g.norm(dim=1, keepdim=True)
    some = (lengths[0] > 0) & (lengths[1] > 0)
    middle = d / torch.where(some, lengths[0], 1.0) + g / torch.where(some, lengths[1], 1.0)
    length = middle.norm(dim=1, keepdim=True)
    some &= length > 1e-6  # what is left of opposite directions is rounding
    return torch.where(some, middle / torch.where(some, length, 1.0), 0.0).to(difference.device, difference.dtype)


def linearised_optimum(
    difference: Float[Tensor, "n d"], gradient: Float[Tensor, "n d"], rank: int
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "k d"]]:
    """The subspace whose patch does most to first order, averaged over pairs.

    A patch within orthonormal V changes the metric by (V D).(V G), on average by the trace of V M V^T with
    M = mean of (D G^T + G D^T) / 2. That is greatest at the leading eigenvectors of M, as far as their eigenvalues are
    positive: further directions only take away. Solved in the span of the D and G, so nothing of size d x d is made
    where there are few pairs.

    Args:
        difference: D, one pair a row.
        gradient: G.
        rank: The most directions to return.

    Returns:
        `(values, basis)`: the positive eigenvalues of M, largest first and at most `rank` of them, whose sum is the
        effect; and as many orthonormal rows. Empty where no patch does more than none. On the CPU.

    Raises:
        ValueError: If the shapes differ, a number is not finite, or `rank < 1`.
    """
    d, g = _pairs("linearised_optimum", difference, gradient)
    if rank < 1 or not len(d):
        raise ValueError(f"linearised_optimum was asked for rank {rank} of {len(d)} pairs; both start at 1. Raise it.")
    frame = torch.linalg.qr(torch.cat([d, g]).T)[0].T  # rows that span all D and G
    inner = (frame @ d.T) @ (g @ frame.T) / len(d)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = min(rank, int((values > 1e-12 * values.abs().max()).sum()))
    return values[:kept], vectors[:, :kept].T @ frame


def random_direction_moments(
    difference: Float[Tensor, "n d"], gradient: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Mean and second moment of (v.D)(v.G) over uniform random unit v: what a random patch of rank one does.

    D.G / d and (|D|^2 |G|^2 + 2 (D.G)^2) / (d (d + 2)), from the fourth moments of the uniform distribution on the
    sphere (Isserlis' theorem, divided by the fourth moment of the length of a Gaussian vector).

    Raises:
        ValueError: If the shapes differ or a number is not finite.
    """
    d, g = _pairs("random_direction_moments", difference, gradient)
    width, whole = d.shape[1], (d * g).sum(1)
    second = (d.square().sum(1) * g.square().sum(1) + 2 * whole.square()) / (width * (width + 2))
    like = difference.device, difference.dtype
    return (whole / width).to(*like), second.to(*like)


# --------------------------------------------------------------------------------------------- what a reader can see
@final
@dataclass(frozen=True, eq=False)
class RowSpace:
    """The directions that a linear reader sees; it maps every state orthogonal to them to zero."""

    basis: Float64[Tensor, "r d"]
    """Orthonormal rows, by falling gain."""
    singular_values: Float64[Tensor, " s"]
    """All gains of the reader, falling, those that count as zero included."""

    @property
    def rank(self) -> int:
        """How many directions are seen."""
        return len(self.basis)

    @property
    def effective_rank(self) -> float:
        """exp(H) with H the entropy of the squared singular values over their sum; 0 for a reader of nothing.

        Between 1 and the rank, which it equals where all gains are equal. The definition of Roy & Vetterli 2007
        (https://ieeexplore.ieee.org/document/7098875) with squares, which are shares of what an isotropic state writes.
        """
        energy = self.singular_values.square()
        if float(energy.sum()) == 0.0:
            return 0.0
        share = energy / energy.sum()
        return float(torch.special.entr(share).sum().exp())


def row_space(reader: Float[Tensor, "p d"], *, tolerance: float = 1e-5) -> RowSpace:
    """What a linear reader `y = reader @ h` sees, by singular values.

    Never by QR: the factor of a reader that lacks a direction (weights centred because a norm follows) keeps a column
    in its place that is nearly invisible.

    Args:
        reader: One output a row.
        tolerance: Gains up to this share of the largest count as zero. The default lies above what rounding to float32
            leaves; of weights rounded to half precision take what follows (centring, folding) in a wider dtype first.

    Returns:
        Basis and gains in float64, on the CPU.

    Raises:
        ValueError: If the reader is empty or not finite, or the tolerance not in [0, 1).
    """
    if reader.numel() == 0 or not bool(reader.isfinite().all()) or not 0.0 <= tolerance < 1.0:
        raise ValueError(
            f"row_space was given a reader of shape {tuple(reader.shape)} and tolerance={tolerance}. It needs finite "
            "weights and a tolerance in [0, 1)."
        )
    _, gains, axes = torch.linalg.svd(_wide(reader), full_matrices=False)
    return RowSpace(axes[gains > tolerance * gains[0]], gains)


@final
@dataclass(frozen=True, eq=False)
class Split:
    """A subspace taken apart by what a reader sees of it; every part has orthonormal rows.

    A patch needs parts of unit length: the plain projection of a direction moves a state by less than the coordinate
    it reads, by the factor `visible` for a single direction.
    """

    row: Float[Tensor, "a d"] | None
    """What the reader sees; None where it sees nothing."""
    null: Float[Tensor, "b d"] | None
    """What it does not see; None where it sees everything."""
    visible: float
    """|Pi V|^2 / k, the mean squared cosine to the row space (Pi its projector): 1 inside, 0 in the kernel."""

    @property
    def span(self) -> Float[Tensor, "c d"]:
        """Both parts together, which contains the subspace. For an exact reader a patch of it equals one of `row`."""
        return torch.cat([part for part in (self.row, self.null) if part is not None])


def split_by_row_space(
    basis: Float[Tensor, "k d"], row_space: Float[Tensor, "r d"], *, tolerance: float = 1e-5
) -> Split:
    """The part of a subspace that a reader sees, and the part that it does not.

    Args:
        basis: Orthonormal rows V.
        row_space: Orthonormal rows, `RowSpace.basis`; none for a reader that sees nothing.
        tolerance: Shortest part of a unit vector of the subspace that counts; shorter ones are rounding of the bases.

    Returns:
        Parts in the dtype of `basis`; a row points along the rows of `basis` that it came from.

    Raises:
        ValueError: If the widths differ, `basis` is empty, or rows are not orthonormal.
    """
    _check_frames(basis, row_space)
    v, rows = _wide(basis), _wide(row_space)
    inside = v @ rows.T
    null = v - inside @ rows
    null = null - (null @ rows.T) @ rows  # again: what rounding left inside is large beside a short part
    return Split(
        row=_frame(inside @ rows, v, tolerance, basis),
        null=_frame(null, v, tolerance, basis),
        visible=float(inside.square().sum()) / len(v),
    )


def visible_fraction_moments(k: int, r: int, d: int) -> tuple[float, float]:
    """Mean and standard deviation of `Split.visible` for a uniformly random subspace.

    With p = r/d the mean is p and the variance 2 (d-k) r (d-r) / (k d^2 (d-1) (d+2)), which for a single direction is
    p (1-p) / (d/2 + 1).

    Args:
        k: Rank of the subspace.
        r: Rank of the reader.
        d: Width.

    Raises:
        ValueError: If not `1 <= k <= d` and `0 <= r <= d`.
    """
    _check_ranks("visible_fraction_moments", k, r, d)
    if k == d:
        return r / d, 0.0
    variance = 2 * (d - k) * r * (d - r) / (k * d**2 * (d - 1) * (d + 2))
    return r / d, variance**0.5


def visible_fraction_quantile(r: int, d: int, q: float) -> float:
    """The `q` quantile of `Split.visible` for a uniformly random direction: that of Beta(r/2, (d-r)/2).

    Args:
        r: Rank of the reader.
        d: Width.
        q: Probability.

    Raises:
        ValueError: If not `0 <= r <= d` and `0 <= q <= 1`.
    """
    _check_ranks("visible_fraction_quantile", 1, r, d)
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"visible_fraction_quantile was asked for q={q}; a probability lies in [0, 1]. Change it.")
    return r / d if r in (0, d) else float(betaincinv(r / 2, (d - r) / 2, q))


# ---------------------------------------------------------------------------------------------------------- internals
def _wide(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _pairs(asked: str, difference: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    d, g = _wide(difference), _wide(gradient)
    if d.shape != g.shape or not bool(d.isfinite().all() & g.isfinite().all()):
        raise ValueError(
            f"{asked} was given differences of shape {tuple(d.shape)} and gradients of shape {tuple(g.shape)}; they "
            "must be finite and of one shape. Pass one row a pair of each."
        )
    return d, g


def _frame(part: Tensor, v: Tensor, tolerance: float, like: Tensor) -> Tensor | None:
    """An orthonormal basis of a part of a subspace, pointing along its rows v; None where it is shorter than that."""
    _, lengths, axes = torch.linalg.svd(part, full_matrices=False)
    axes = axes[lengths > tolerance]
    signs = torch.where((axes @ v.T).sum(1) < 0, -1.0, 1.0).double()
    return (axes * signs[:, None]).to(like.device, like.dtype) if len(axes) else None


def _check_frames(basis: Tensor, row_space: Tensor) -> None:
    slack = 1e-4 if basis.dtype in (torch.float32, torch.float64) else 2e-2
    fits = len(basis) > 0 and basis.shape[1] == row_space.shape[1]
    if not fits or any(len(rows) and not off_identity(rows, rows) <= slack for rows in (basis, row_space)):
        raise ValueError(
            f"split_by_row_space was given a basis of shape {tuple(basis.shape)} and a row space of shape "
            f"{tuple(row_space.shape)}. Both need orthonormal rows of one width: use row_space(reader).basis."
        )


def _check_ranks(asked: str, k: int, r: int, d: int) -> None:
    if not (1 <= k <= d and 0 <= r <= d):
        raise ValueError(f"{asked} was asked for k={k}, r={r} in {d} dimensions; ranks run up to {d}. Change them.")
