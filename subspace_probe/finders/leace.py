"""Least-squares concept erasure: the smallest affine change after which no linear probe can read a label."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float64
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import DataError
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.covariances import FactorMoments, Shrinkage, check_shrinkage, factor_moments, shrunk_by
from subspace_probe.finders.fitting import Fitting
from subspace_probe.finders.levels import principal_axes
from subspace_probe.linalg.shrinkage import inverse_times, pseudo_inverse_times


@final
@dataclass(frozen=True)
class LEACE:
    """LEACE: x - W^+ P W (x - mu), W = Sigma^-1/2, P onto W Sigma_xz (Belrose et al. 2023, arXiv:2306.03819).

    The eraser is `subspace.reject`. It is oblique: the basis spans what the label moves (Sigma_xz; for a binary label
    the difference of means), the reader looks along Sigma^-1 of that, the origin is the mean of all rows. After it the
    label and the activations have no covariance on the rows it was fitted on, so that there no linear probe beats a
    constant; on other rows this holds up to sampling. Among all affine maps with that property it changes the
    activations least. Erasure is linear: a nonlinear reader may still find the label.

    `Ablate` projects orthogonally and refuses an eraser: use `subspace.reject`, in float32. Rounded to half precision
    afterwards, states with a large common mean can be read again, because what is left of the label is a rounding.

    Shrinking Sigma changes only what the reader looks along. The basis comes from Sigma_xz as it is, so erasure on the
    rows of the fit stays exact; the change is no longer quite the least. With fewer rows than coordinates and no
    shrinkage, the inverse is a pseudo-inverse, and the reader fits noise.

    Args:
        factor: what to erase, with any number of values; the label where None.
        shrinkage: weight of the scaled identity in Sigma; "oas" estimates it, 0 is the formula as published.
        rank_tolerance: axes of the means narrower than this fraction of the widest are left in the activations.
        null_draws: permutations behind `found`; 0 skips the test.
        seed: of the permutations.
    """

    name: ClassVar[str] = "leace"
    cost: ClassVar[str] = "one pass, O(n d^2 + d^3)"
    use: ClassVar[str] = "to erase a label or nuisance from linear probes at the least change"

    factor: str | None = None
    shrinkage: Shrinkage = "oas"
    rank_tolerance: float = 1e-6
    null_draws: int = 99
    seed: int = 0

    def fit(self, acts: Activations, site: Site) -> Subspace:
        """Fit on activations, in memory or on disk.

        Raises:
            ConfigError: shrinkage outside [0, 1].
            DataError: a class without rows, or a factor with one value.
            ShapeError: non-finite activations.
            UnknownName: no such factor.
        """
        check_shrinkage(self.name, self.shrinkage)
        fitting = Fitting(self, acts, site)
        seen = factor_moments(fitting, self._values(fitting), draws=self.null_draws, seed=self.seed)
        raw = seen.total.covariance(ddof=0)
        covariance, alpha = shrunk_by(self.shrinkage, raw, seen.total.n)
        basis, scale = _moved_axes(seen, self.rank_tolerance)
        empty = len(basis) == 0
        if empty:
            basis, scale = torch.eye(1, fitting.width, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        reader = basis if empty else oblique_reader(covariance, basis, exact=alpha == 0)
        test = seen.test()
        erased = 0.0 if empty else float((reader @ raw @ reader.T).trace() / raw.trace())
        return fitting.result(
            basis,
            scale,
            seen.total.mean,
            found=not (empty or (test["p"] or 0.0) > 0.05),
            orientation=f"towards larger values of {self.factor}" if self.factor else "towards label 1",
            reader=reader,
            notes={**test, "alpha": alpha, "rank": 0 if empty else len(basis), "variance_removed": erased},
        )

    def _values(self, fitting: Fitting) -> Tensor:
        if self.factor is None:
            fitting.require_classes()
            return fitting.acts.labels
        values = fitting.acts.factor(self.factor)
        if len(values.unique()) < 2:
            raise DataError(
                f"leace was asked to erase {self.factor!r}, which has the one value {int(values[0])} in all "
                f"{len(values)} rows: there is nothing to erase. Add prompts with other values."
            )
        return values


def oblique_reader(
    covariance: Float64[Tensor, "d d"], basis: Float64[Tensor, "k d"], *, exact: bool = False
) -> Float64[Tensor, "k d"]:
    """The rows R for which B' R = W^+ P W, W = covariance^-1/2 and P onto W B': R = (B S^-1 B')^-1 B S^-1.

    Whatever the covariance, R B' = I: what the basis spans is removed exactly. The covariance decides only how little
    else changes.

    Args:
        covariance: of the rows, shrunk or not.
        basis: orthonormal rows, inside its range.
        exact: it was not shrunk, so that it may have no inverse but a pseudo-inverse.
    """
    solved = pseudo_inverse_times(covariance, basis)[0] if exact else inverse_times(covariance, basis)
    return torch.linalg.solve(solved @ basis.T, solved)


def _moved_axes(seen: FactorMoments, tolerance: float) -> tuple[Tensor, Tensor]:
    """Basis and scale of the span of the covariances of rows and values; no row where the means are all the same."""
    # what rounding leaves of equal means must not become a subspace
    if float(seen.deviations.norm()) <= 1e-12 * (1 + float(seen.total.mean.norm())):
        return seen.deviations[:0], seen.shares[:0]
    return principal_axes(seen.deviations, seen.shares, seen.levels, tolerance)
