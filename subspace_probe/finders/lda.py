"""Linear discriminant analysis: the direction that tells two classes of equal covariance apart best."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import DataError
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.covariances import Shrinkage, check_shrinkage, factor_moments, shrunk_by
from subspace_probe.finders.fitting import Fitting
from subspace_probe.linalg.shrinkage import inverse_times, pseudo_inverse_times


@final
@dataclass(frozen=True)
class LDA:
    """Sw^-1 (mu1 - mu0): the optimal reader of two normal classes that share the covariance Sw (Fisher 1936).

    This is a reading direction, not a steering direction. It looks along what tells the classes apart after
    discounting what else varies, so it may point almost anywhere relative to the difference of means, and a perfect
    reader may do nothing at all when it is added to the activations. To write, use the mean difference.

    The scale of the result is the gap between the class means along it, its origin the midpoint of the class means,
    which lies on the decision boundary of classes of equal prior; a positive coordinate means label 1. Found when
    the classes lie further apart, in the metric of the shrunk covariance of all rows, than in 95 % of the permutations
    of the labels: never the separation of the training rows, which is perfect whenever n <= d.

    Args:
        shrinkage: weight of the scaled identity in the within-class covariance; "oas" estimates it (Chen et al. 2010).
            0 is classical LDA and takes at least d + 2 rows.
        null_draws: label permutations behind `found`; 0 skips the test.
        seed: of the permutations.
    """

    name: ClassVar[str] = "lda"
    cost: ClassVar[str] = "one pass, O(n d^2 + d^3)"
    use: ClassVar[str] = "to read a label where other variance hides it; not to steer"

    shrinkage: Shrinkage = "oas"
    null_draws: int = 99
    seed: int = 0

    def fit(self, acts: Activations, site: Site) -> Subspace:
        """Fit on activations, in memory or on disk.

        Raises:
            ConfigError: shrinkage outside [0, 1].
            DataError: a class with fewer than two rows; too few rows, or constant coordinates, for no shrinkage.
            ShapeError: non-finite activations.
        """
        check_shrinkage(self.name, self.shrinkage)
        fitting = Fitting(self, acts, site)
        fitting.require_classes(least=2)
        n, d = acts.rows.n, fitting.width
        if self.shrinkage == 0 and n < d + 2:
            raise DataError(
                f"lda with shrinkage=0 was given {n} rows of width {d} and needs at least {d + 2}, since each class "
                "mean takes one. Add rows, or use shrinkage='oas'."
            )
        seen = factor_moments(fitting, acts.labels, draws=self.null_draws, seed=self.seed)
        gap = seen.deviations[1] - seen.deviations[0]
        # no gap, as at layer 0 of template tokens: what rounding leaves of it must not become a direction
        empty = float(gap.norm()) <= 1e-12 * (1 + float(seen.total.mean.norm()))
        within, alpha = seen.within, 0.0
        if not empty and float(within.trace()) <= 1e-12 * float(gap.square().sum()):
            raise DataError(
                f"lda was given {n} rows that do not vary within their class, so that every direction with a gap "
                "separates them perfectly. Add prompts that vary, or use mean_difference."
            )
        weights = torch.eye(1, d, dtype=torch.float64)[0]
        if not empty:
            within, alpha = shrunk_by(self.shrinkage, within, n)
            weights = discriminant(within, gap, exact=alpha == 0)
        unit = weights / weights.norm()
        test = seen.test()
        return fitting.result(
            unit[None],
            torch.tensor([0.0 if empty else float(unit @ gap)]),
            seen.total.mean + seen.deviations.mean(dim=0),
            found=not (empty or (test["p"] or 0.0) > 0.05),
            orientation="towards label 1",
            notes={**test, "alpha": alpha, "n_positive": int((acts.labels == 1).sum())},
        )


def discriminant(
    within: Float[Tensor, "d d"], gap: Float[Tensor, " d"], *, exact: bool = False
) -> Float64[Tensor, " d"]:
    """`within^-1 gap`, unnormalised.

    Args:
        within: covariance within the classes, shrunk or not.
        gap: mean of the positive class less that of the negative one.
        exact: `within` was not shrunk, so that it may have no inverse.

    Raises:
        DataError: `within` has no inverse.
    """
    if not exact:
        return inverse_times(within, gap[None])[0]
    weights, rank = pseudo_inverse_times(within, gap[None])
    if rank < len(gap):
        raise DataError(
            f"The within-class covariance has rank {rank} of {len(gap)}: some coordinates are constant or "
            "combinations of others, so that it has no inverse. Use shrinkage='oas'."
        )
    return weights[0]
