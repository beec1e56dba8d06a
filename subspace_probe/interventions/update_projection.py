"""Keep of a fine-tuning update what lies in a subspace of weight space, or what lies outside it.

Ponkshe et al. 2025, arXiv:2505.14185: W_aligned + P D or W_aligned + (I - P) D, where D = W_tuned - W_aligned and P
projects on leading singular vectors of the alignment update W_aligned - W_base. With left vectors P acts on outputs,
with right ones on inputs; two-sided it is P_left D P_right.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, final, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.linalg.modes import Modes

Side = Literal["left", "right", "both"]
Part = Literal["parallel", "orthogonal"]
Kind = Literal["top", "random", "random singular"]


@final
@dataclass(frozen=True, eq=False)
class Frames:
    """Orthonormal rows to project one matrix on.

    Attributes:
        left: [k out], in output space.
        right: [k in], in input space.
    """

    left: Float64[Tensor, "k out"]
    right: Float64[Tensor, "k in"]


def as_matrix(weight: Tensor) -> Float[Tensor, "out in"]:
    """A weight as the matrix it is projected as: a vector is one column, so it is projected on the other vector."""
    return weight[:, None] if weight.ndim == 1 else weight.flatten(1)


def rank_at(fraction: float, modes: Modes) -> int:
    """How many modes a fraction of the smaller side is, at least one and at most all there are."""
    small = min(modes.left.shape[1], modes.right.shape[1])
    return max(1, min(modes.rank, round(fraction * small)))


def frames(kind: Kind, modes: Modes, k: int, *, seed: int = 0) -> Frames:
    """The subspaces of a projection or of one of its controls.

    Args:
        kind: "top", the leading modes; "random singular", any of the modes; "random", spans of Gaussian matrices.
        modes: of the alignment update.
        k: how many.
        seed: of the two controls.

    Raises:
        ConfigError: another kind, or a rank that is not to be had.
    """
    out, width = modes.left.shape[1], modes.right.shape[1]
    most = max(out, width) if kind == "random" else modes.rank
    if not 1 <= k <= most or kind not in get_args(Kind):
        raise ConfigError(
            f"kind={kind!r} of rank {k} was asked for. The kinds are {get_args(Kind)}, ranks 1 to {most}."
        )
    if kind == "top":
        return Frames(modes.left[:k], modes.right[:k])
    generator = torch.Generator().manual_seed(seed)
    if kind == "random singular":
        chosen = torch.randperm(modes.rank, generator=generator)[:k]
        return Frames(modes.left[chosen], modes.right[chosen])
    left, right = (
        cast(Tensor, torch.linalg.qr(torch.randn(d, min(k, d), generator=generator, dtype=torch.float64))[0]).T
        for d in (out, width)
    )
    return Frames(left, right)


def project_update(
    update: Float[Tensor, "out in"], onto: Frames, *, side: Side, part: Part
) -> Float64[Tensor, "out in"]:
    """The part of an update inside ("parallel") or outside ("orthogonal") the subspaces, in float64.

    The two parts are orthogonal to each other and add up to the update, so their energies add up to its own.

    Raises:
        ConfigError: a side or part of another name.
    """
    if side not in get_args(Side) or part not in get_args(Part):
        raise ConfigError(f"side={side!r}, part={part!r}: sides are {get_args(Side)}, parts are {get_args(Part)}.")
    whole = inside = update.double()
    if side != "right":
        inside = onto.left.T @ (onto.left @ inside)
    if side != "left":
        inside = (inside @ onto.right.T) @ onto.right
    return inside if part == "parallel" else whole - inside


def matched_rank(share: float, shape: tuple[int, int], side: Side) -> int:
    """The rank at which a random subspace holds this share of any matrix's energy on average, at least one.

    A random rank-k left projection keeps k / out of the energy, a right one k / in, a two-sided one the product. So the
    same fraction of the smaller side is another share of the energy in every matrix that is not square.
    """
    out, width = shape
    wanted = {"left": share * out, "right": share * width, "both": (share * out * width) ** 0.5}[side]
    most = {"left": out, "right": width, "both": max(out, width)}[side]
    return max(1, min(most, round(wanted)))


@final
@dataclass(frozen=True, eq=False)
class Projected:
    """What became of an update.

    Attributes:
        energy: squared norm of what was kept over that of the whole update, all weights together.
        shares: the same for each weight.
    """

    energy: float
    shares: Mapping[str, float]


def write_projected(
    write: Callable[[str, Tensor], None],
    aligned: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    onto: Mapping[str, Frames],
    *,
    side: Side,
    part: Part,
) -> Projected:
    """Write aligned weights plus the kept part of an update, a weight at a time.

    A weight that alignment left as it was has no subspace: all of its update is outside. Vectors are projected on the
    alignment's own vector whatever the side.

    Args:
        write: takes a weight's name and its numbers; see `models.checkpoints.rewritten`.
        aligned: weights by name.
        update: what tuning added to each.
        onto: the subspaces of those that alignment changed.
    """
    shares: dict[str, float] = {}
    kept = total = 0.0
    for name, base in aligned.items():
        delta = update[name].double()
        if name in onto:
            along: Side = "left" if delta.ndim == 1 else side
            left = project_update(as_matrix(delta), onto[name], side=along, part=part).reshape(delta.shape)
        else:
            left = delta if part == "orthogonal" else torch.zeros_like(delta)
        write(name, (base.double() + left).to(base.dtype))
        inside, whole = float(left.square().sum()), float(delta.square().sum())
        shares[name] = inside / whole if whole else 0.0
        kept, total = kept + inside, total + whole
    return Projected(kept / total if total else 0.0, shares)
