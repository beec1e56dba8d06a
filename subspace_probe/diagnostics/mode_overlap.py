"""How much the leading modes of two matrices share: mode subspace overlap, of weight updates and of activations.

MSO(A, B; share) = ||Q_A Q_B^T||_F^2 / min(k, l), with Q the leading left singular vectors that hold a share of the
energy (Ponkshe et al. 2025, arXiv:2505.14185). Overlap of spans is not the same as "not linearly separable": two
classes may vary along the same directions and still lie on two sides of a plane.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import DataError, ShapeError
from subspace_probe.linalg.angles import cosine, mode_subspace_overlap
from subspace_probe.linalg.modes import Modes, modes
from subspace_probe.linalg.nulls import chance_overlap

ARTEFACT = 0.25
"""An uncentred overlap this much above the centred one is that of the means."""


@final
@dataclass(frozen=True)
class ModeOverlap:
    """One overlap and what chance gives.

    Attributes:
        value: in [0, 1].
        ranks: modes on either side; where one of them is 1, the overlap is the length of one projection.
        chance: expected for unrelated subspaces of these ranks, max(k, l) / d.
    """

    value: float
    ranks: tuple[int, int]
    chance: float


@final
@dataclass(frozen=True)
class ActivationOverlap:
    """Overlap of what two sets of activations vary along, with and without their means.

    Attributes:
        centred: each set about its own mean.
        uncentred: as published, the mean taken as one more direction of variation.
        mean_cosine: between the two means.
    """

    centred: ModeOverlap
    uncentred: ModeOverlap
    mean_cosine: float

    @property
    def mean_artefact(self) -> bool:
        """Whether the uncentred figure is mostly that of a shared mean."""
        return self.uncentred.value - self.centred.value > ARTEFACT


def mode_overlap(a: Modes, b: Modes, share: float) -> ModeOverlap:
    """Overlap of the fewest leading left modes of each that hold a share of the energy.

    Raises:
        ShapeError: matrices of different output widths.
    """
    width, other = a.left.shape[1], b.left.shape[1]
    if width != other:
        raise ShapeError(f"Modes in {width} and {other} dimensions were to be compared. Compare one weight's own.")
    k, l = a.holding(share), b.holding(share)  # noqa: E741
    return ModeOverlap(mode_subspace_overlap(a.left[:k], b.left[:l]), (k, l), chance_overlap(k, l, width))


def activation_overlap(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], share: float = 0.9) -> ActivationOverlap:
    """Overlap of the directions that two sets of activations vary along.

    A mean that both share makes any two sets overlap uncentred, whatever they vary along: at small shares the first
    mode is the mean. So the centred figure is the one to read.

    Raises:
        DataError: a set that does not vary, or of fewer than two rows.
        ShapeError: different widths.
    """
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"Activations of widths {a.shape[1]} and {b.shape[1]} cannot be compared. Use one site.")
    values: list[ModeOverlap] = []
    for centre in (True, False):
        first, second = (_modes(x.double(), centre) for x in (a, b))
        values.append(mode_overlap(first, second, share))
    means = [x.double().mean(0) for x in (a, b)]
    known = all(float(mean.abs().max()) > 0 for mean in means)
    return ActivationOverlap(values[0], values[1], cosine(means[0], means[1]) if known else float("nan"))


def _modes(rows: Tensor, centre: bool) -> Modes:
    found = modes((rows - rows.mean(0) if centre else rows).T) if len(rows) > 1 else None
    if found is None:
        raise DataError(f"{len(rows)} activations that do not vary have no modes. Give more prompts, or another site.")
    return found


def planted_overlap(n: int = 400, d: int = 64, k: int = 8, mean: float = 30.0, *, seed: int = 0) -> ActivationOverlap:
    """The control of the measure itself: two sets that vary along orthogonal directions about one common mean."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, 2 * k + 1, generator=generator, dtype=torch.float64))[0].T
    one, two = (
        torch.randn(n, k, generator=generator, dtype=torch.float64) @ part + mean * basis[-1]
        for part in (basis[:k], basis[k : 2 * k])
    )
    return activation_overlap(one, two)
