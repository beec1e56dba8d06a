"""Logistic regression: the usual linear probe, as a direction in activation units."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.fitting import Fitting
from subspace_probe.finders.folds import group_folds
from subspace_probe.finders.permuting import permuted_labels
from subspace_probe.linalg.permutations import permutation_p
from subspace_probe.linalg.ranking import auroc


@final
@dataclass(frozen=True)
class LinearProbe:
    """L2-regularised logistic regression (scikit-learn, lbfgs), its weights mapped back to raw activation units.

    A reading direction, not a steering direction: it may lie far from the difference of means, and a perfect probe may
    do nothing when it is steered. The scale is the gap between the class means along it; the origin is the point of
    the decision boundary, intercept included, that is nearest to the midpoint of the class means. A positive
    coordinate means that the probe says label 1.

    Needs all rows in memory at once, in float64: the optimum is no function of sums over rows. Found when the
    cross-validated AUROC, with pairs and groups kept in one fold, beats 95 % of those under permuted labels; with the
    default of 19 permutations, all of them. Each permutation costs `folds` fits, so raise `null_draws` where they are
    cheap and p must be finer than 0.05.

    Args:
        c: inverse strength of the regularisation, on standardised coordinates where `standardise` is set.
        standardise: give every coordinate variance one first, so that regularisation does not favour large ones.
        balanced: weigh the classes equally, whatever their sizes; no difference where they are equal.
        folds: of the cross-validation, at most; fewer where the rarer class has fewer groups.
        null_draws: label permutations behind `found`; 0 skips the test.
        seed: of the permutations.
    """

    name: ClassVar[str] = "linear_probe"
    cost: ClassVar[str] = "all rows in memory; lbfgs, folds x (1 + null_draws) fits"
    use: ClassVar[str] = "to ask how well a label can be read linearly; not to steer"

    c: float = 1.0
    standardise: bool = True
    balanced: bool = True
    folds: int = 5
    null_draws: int = 19
    seed: int = 0

    def fit(self, acts: Activations, site: Site) -> Subspace:
        """Fit on activations, read into memory.

        Raises:
            ConfigError: `c` not positive, or fewer than two folds.
            DataError: a class with fewer than two rows.
            ShapeError: non-finite activations.
        """
        if not self.c > 0 or self.folds < 2:
            raise ConfigError(
                f"linear_probe was given c={self.c}, folds={self.folds}; c > 0 and folds >= 2 are needed."
            )
        fitting = Fitting(self, acts, site)
        fitting.require_classes(least=2)
        labels = acts.labels
        x = torch.cat([block.to("cpu", torch.float64) for block, _ in fitting.batches()])
        centre, spread = x.mean(dim=0), x.std(dim=0, correction=0)
        spread = torch.where(spread > 0, spread, 1.0) if self.standardise else torch.ones_like(spread)
        frame, inner = row_space((x - centre) / spread)
        inside, offset = self._weights(inner, labels, tolerance=1e-9)
        weights = (frame @ inside) / spread
        means = [x[labels == label].mean(dim=0) for label in (0, 1)]
        length = float(weights.norm())
        empty = length <= 1e-12
        unit = torch.eye(1, x.shape[1], dtype=torch.float64)[0] if empty else weights / length
        middle = (means[0] + means[1]) / 2
        height = 0.0 if empty else float((middle - centre) @ weights + offset) / length
        test = self._test(inner, acts)
        return fitting.result(
            unit[None],
            torch.tensor([0.0 if empty else float(unit @ (means[1] - means[0]))]),
            middle - height * unit,
            found=not (empty or (test["p"] or 0.0) > 0.05),
            orientation="towards label 1",
            notes={**test, "n_positive": int((labels == 1).sum())},
        )

    def _test(self, inner: Float64[Tensor, "n r"], acts: Activations) -> dict[str, float | int | None]:
        """Cross-validated AUROC and accuracy, and the AUROC under permuted labels."""
        labels = acts.labels
        fold = group_folds(labels, acts.pairs, acts.groups, most=self.folds)
        auc, accuracy = self._validated(inner, labels, fold)
        null: list[float] = []
        for draw in range(self.null_draws):
            drawn = permuted_labels(acts, seed=self.seed + draw)
            null.append(self._validated(inner, drawn, fold)[0])
        tested = bool(null) and auc == auc
        # a draw without a score of its own cannot speak against chance: it counts as a perfect one
        draws = torch.tensor([1.0 if score != score else score for score in null], dtype=torch.float64)
        return {
            "folds": int(fold.max()) + 1,
            "cv_auroc": auc if auc == auc else None,
            "cv_accuracy": accuracy if auc == auc else None,
            "null_auroc_95": float(draws.quantile(0.95)) if tested else None,
            "p": permutation_p(auc, draws, side="greater") if tested else (1.0 if null else float("nan")),
        }

    def _validated(self, x: Tensor, labels: Int[Tensor, " n"], fold: Int[Tensor, " n"]) -> tuple[float, float]:
        """Mean over folds of AUROC and of balanced accuracy; nan where no fold can be scored."""
        scores: list[tuple[float, float]] = []
        for held in range(int(fold.max()) + 1):
            out = fold == held
            if min(len(labels[out].unique()), len(labels[~out].unique())) < 2:
                continue  # one class only: nothing to learn, or nothing to rank
            weights, offset = self._weights(x[~out], labels[~out], tolerance=1e-4)
            score = x[out] @ weights + offset
            right = (score > 0) == (labels[out] == 1)
            halves = [float(right[labels[out] == label].double().mean()) for label in (0, 1)]
            scores.append((auroc(score, labels[out]), sum(halves) / 2))
        if not scores:
            return float("nan"), float("nan")
        first, second = zip(*scores, strict=True)
        return sum(first) / len(first), sum(second) / len(second)

    def _weights(
        self, x: Tensor, labels: Int[Tensor, " n"], *, tolerance: float
    ) -> tuple[Float64[Tensor, " r"], float]:
        """Weights and intercept."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(
            C=self.c, class_weight="balanced" if self.balanced else None, tol=tolerance, max_iter=10_000
        )
        model.fit(x.numpy(), labels.numpy())
        return torch.from_numpy(np.asarray(model.coef_, dtype=np.float64)[0]), float(np.asarray(model.intercept_)[0])


def row_space(x: Float64[Tensor, "n d"]) -> tuple[Float64[Tensor, "d r"], Float64[Tensor, "n r"]]:
    """An orthonormal frame, and the rows in it, with r = min(n, d).

    Regularised weights lie in the span of the rows, and their length does not depend on the frame: fits of few wide
    rows can be done there, exactly, at a fraction of the cost.
    """
    if len(x) >= x.shape[1]:
        return torch.eye(x.shape[1], dtype=torch.float64), x
    frame, triangle = torch.linalg.qr(x.T)
    return frame, triangle.T
