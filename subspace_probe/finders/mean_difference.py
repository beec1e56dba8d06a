"""Difference of class means."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.fitting import Fitting
from subspace_probe.finders.permuting import permuted_labels, require_enough
from subspace_probe.linalg.moments import Moments
from subspace_probe.linalg.permutations import permutation_p


@final
@dataclass(frozen=True)
class MeanDifference:
    """Mean of the positive class minus mean of the negative one, raw length (Arditi et al. 2024, eq. 1).

    The scale of the result is the gap between the class means (as paired or stratified), its origin their midpoint, its
    sign points to the positive class. Accumulated in float64. The direction counts as found when the gap is longer than
    95 % of the gaps under permuted labels; otherwise it is returned with `found=False`.

    Args:
        paired: average the differences within minimal pairs, and use only rows whose pair has both classes.
        strata: a factor; the differences within each of its values are averaged with equal weight, so that the factor
            cannot leak into the direction. In a 2 x 2 design the other variable.
        null_draws: label permutations behind `found`; 0 skips the test.
        seed: of the permutations.
    """

    name: ClassVar[str] = "mean_difference"
    cost: ClassVar[str] = "one pass, O(n d) per permutation"
    use: ClassVar[str] = "first; the direction most steering and ablation is done with"

    paired: bool = False
    strata: str | None = None
    null_draws: int = 199
    seed: int = 0

    def fit(self, acts: Activations, site: Site) -> Subspace:
        """Fit on activations, in memory or on disk.

        Raises:
            DataError: a class (or a class within a stratum) without rows; no complete pair.
            ShapeError: non-finite activations.
        """
        fitting = Fitting(self, acts, site)
        labels = acts.labels
        weights = self._weights(acts, labels)
        drawn = [self.permuted(acts, self.seed + draw) for draw in range(self.null_draws)]
        nulls = [self._weights(acts, labels) for labels in drawn]
        if drawn:
            require_enough(torch.stack(drawn), self.name)
        positive = Moments.empty(fitting.width, second=False)
        negative = Moments.empty(fitting.width, second=False)
        # the last row of weights takes the middle of the two means whose difference the first takes
        stacked, start = torch.stack([weights, *nulls, weights.abs() / 2]), 0
        sums = torch.zeros(len(stacked), fitting.width, dtype=torch.float64)
        for block, block_labels in fitting.batches():
            positive = positive.update(block[block_labels == 1])
            negative = negative.update(block[block_labels == 0])
            sums += stacked[:, start : start + len(block)] @ block.double()
            start += len(block)
        gap, null = sums[0], sums[1:-1].norm(dim=1)
        length = float(gap.norm())
        p = permutation_p(length, null, side="greater") if len(null) else float("nan")
        # no gap at all, as at layer 0 of template tokens: dividing by its length would make noise a unit vector
        empty = length <= 1e-12 * (1 + float(positive.mean.norm()))
        basis = torch.eye(1, len(gap)) if empty else (gap / length)[None].float()
        return fitting.result(
            basis,
            torch.tensor([0.0 if empty else length]),
            sums[-1],
            found=not (empty or p > 0.05),
            orientation="towards label 1",
            notes={
                "gap": length,
                "null_gap_95": float(null.quantile(0.95)) if len(null) else None,
                "p": p,
                "n_positive": positive.n,
                "n_negative": negative.n,
            },
        )

    def permuted(self, acts: Activations, seed: int) -> Int[Tensor, " n"]:
        """The labels under the null that they do not matter: exchanged as pairs and groups allow, within strata."""
        return permuted_labels(acts, seed=seed, strata=None if self.strata is None else acts.factor(self.strata))

    def _weights(self, acts: Activations, labels: Tensor) -> Float[Tensor, " n"]:
        """One weight a row, so that the direction is their weighted sum."""
        if self.paired and self.strata:
            raise ConfigError(
                "MeanDifference was given both paired and strata. Pairs already hold factors fixed; use one."
            )
        if self.paired:
            return _paired_weights(labels, acts.pairs)
        strata = torch.zeros_like(labels) if self.strata is None else acts.factor(self.strata)
        weights = torch.zeros(len(labels), dtype=torch.float64)
        values = strata.unique()
        for value in values:
            for label, sign in ((1, 1.0), (0, -1.0)):
                rows = (strata == value) & (labels == label)
                if not bool(rows.any()):
                    inside = "" if self.strata is None else f" with {self.strata}={int(value)}"
                    raise DataError(f"There are no rows of label {label}{inside} among {len(labels)}. Both are needed.")
                weights[rows] = sign / (int(rows.sum()) * len(values))
        return weights


def _paired_weights(labels: Tensor, pairs: Tensor) -> Float[Tensor, " n"]:
    _, index = pairs.unique(return_inverse=True)
    count = torch.zeros(2, int(index.max()) + 1, dtype=torch.float64)
    count.index_put_((labels, index), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    complete = (count > 0).all(0)
    if not bool(complete.any()):
        raise DataError("No pair has both a positive and a negative row. Give 'pair' numbers, or paired=False.")
    weights = (labels.double() * 2 - 1) / count[labels, index]
    return torch.where(complete[index], weights / complete.sum(), 0.0)
