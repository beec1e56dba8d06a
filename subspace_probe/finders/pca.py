"""Principal components: about the mean, within classes, or of the differences within minimal pairs."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError, IllusionWarning, RankError
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.fitting import Fitting
from subspace_probe.finders.pairing import CompletePairs
from subspace_probe.finders.permuting import permuted_labels
from subspace_probe.linalg.moments import Moments, class_moments
from subspace_probe.linalg.permutations import permutation_p
from subspace_probe.linalg.ranks import ParallelAnalysis, parallel_analysis

LITTLE = 0.1
"""A subspace that holds less than this share of the squared class gap holds almost none of it."""

_SHOWN = 10
"""Eigenvalues in the notes, at least."""


def principal_components(second: Float[Tensor, "d d"]) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
    """Eigenvalues of a covariance, largest first, and their vectors as rows; each largest coordinate positive."""
    values, vectors = torch.linalg.eigh(second.double())
    rows = vectors.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values.flip(0).clamp(min=0), rows * torch.where(largest < 0, -1.0, 1.0)


@final
@dataclass(frozen=True, eq=False)
class _Evidence:
    """What the data say, whatever was taken for their centre.

    Attributes:
        second: covariance, or second moments about zero, shape [d, d].
        origin: the neutral point, shape [d].
        most: the largest rank that so many rows allow.
        units: independent ones among them: groups.
        ddof: means taken off.
        gap: difference of the class means; None where there is one class only. Shape [d].
        gap_variance: variance of the gap along a unit vector, over that of the rows along it.
        null_gaps: the same without a signal: under permuted labels, or random signs of pairs. Shape [draws, d].
    """

    second: Float64[Tensor, "d d"]
    origin: Float64[Tensor, " d"]
    most: int
    units: int
    ddof: int
    gap: Float64[Tensor, " d"] | None
    gap_variance: float
    null_gaps: Float64[Tensor, "draws d"]


@final
class _Gaps:
    """Differences of class means under several labellings, summed while the rows stream by.

    Args:
        labellings: 0 or 1 for every row, each with both; shape [m, n].
    """

    def __init__(self, labellings: Int[Tensor, "m n"], width: int) -> None:
        self._positive = labellings.bool()
        self._counts = self._positive.sum(1, keepdim=True).double(), (~self._positive).sum(1, keepdim=True).double()
        self.sums = torch.zeros(len(labellings), width, dtype=torch.float64)

    def watch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches, seen."""
        start = 0
        for block, labels in batches:
            positive = self._positive[:, start : start + len(block)]
            start += len(block)
            weights = torch.where(positive, 1 / self._counts[0], -1 / self._counts[1])
            self.sums += weights @ block.cpu().double()
            yield block, labels


@final
@dataclass(frozen=True)
class PCA:
    """Directions of largest variance, from exact streaming moments; `centre="pairs"` as in RepE (Zou et al. 2023).

    About the overall mean nothing knows the labels, and the first component need not separate the classes. About zero,
    the differences within minimal pairs give the axis the pairs share: centring them as well, as a plain PCA of the
    differences does, deletes exactly their mean. Where the classes differ, but not (or hardly) inside the subspace,
    `fit` warns.

    The scale of a component is the standard deviation along it (root mean square of the difference for pairs). It
    points to label 1 where the class means differ along it by more than two standard errors, else its largest
    coordinate is positive. The origin is the mean of all rows, or the midpoint of the classes (of complete pairs).

    `found`, about a mean: the variance along every component exceeds what independent coordinates of the same variances
    would have there by more than noise allows (`linalg.ranks.parallel_analysis`), with as many independent rows as
    there are groups, fewer where rows are of uneven length. A component along one coordinate shows no such excess, and
    one that a few very long rows carry may: look at `acts.heavy_rows` first. For pairs: the mean difference along the
    components together is larger than under random signs, one sign a group. Signs leave the components as they are, so
    they test the mean along them and not their eigenvalues; how many of those stand out of noise is `suggested_rank` in
    the notes.

    Args:
        rank: components to keep; None keeps those that parallel analysis finds, at least one.
        centre: "all" about the overall mean; "classes" about the mean of each class (what varies besides the label);
            "pairs" differences positive - negative within complete minimal pairs, not centred. Several rows on one
            side of a pair are averaged.
        null_draws: draws of signs and of permuted labels; 0 skips all tests and the warning.
        seed: of the draws.
    """

    name: ClassVar[str] = "pca"
    cost: ClassVar[str] = "one pass, O(n d^2 + d^3)"
    use: ClassVar[str] = "what states vary in most, whatever the labels; the axis that pairs share"

    rank: int | None = 1
    centre: Literal["all", "pairs", "classes"] = "all"
    null_draws: int = 99
    seed: int = 0

    def fit(self, acts: Activations, site: Site) -> Subspace:
        """Fit on activations, in memory or on disk.

        Raises:
            ConfigError: a rank below 1, or an unknown centre.
            RankError: a rank above the width, or too high for so few rows or pairs.
            DataError: fewer than two rows; no complete pair, or a class without rows, where they are needed.
            ShapeError: non-finite activations.
        """
        self._check()
        fitting = Fitting(self, acts, site)
        seen = self._pairs(fitting) if self.centre == "pairs" else self._rows(fitting)
        values, vectors = principal_components(seen.second)
        parallel = self._parallel(seen)
        rank = self.rank or max(1, 0 if parallel is None else min(parallel.rank, seen.most))
        self._require_rank(rank, len(values), seen.most)
        towards = _towards(values[:rank], vectors[:rank], seen)
        basis = vectors[:rank] * torch.where(towards < 0, -1.0, 1.0)[:, None]
        p, null_95 = self._p(seen, values[:rank], basis, parallel)
        self._warn(seen, basis, site)
        return fitting.result(
            basis,
            values[:rank].sqrt(),
            seen.origin,
            found=float(values[0]) > 0 and (not self.null_draws or p <= 0.05),
            orientation=_orientation(towards),
            notes={
                **_spectrum(values, rank, parallel),
                "p": p,
                "null_95": null_95,
                "n_independent": seen.units,
                "gap": None if seen.gap is None else float(seen.gap.norm()),
                "gap_share": _share(seen.gap, basis),
            },
        )

    def permuted(self, acts: Activations, seed: int) -> Int[Tensor, " n"]:
        """The labels under the null that they do not matter: exchanged as pairs and groups allow."""
        return permuted_labels(acts, seed=seed)

    def _check(self) -> None:
        if self.centre not in ("all", "pairs", "classes"):
            raise ConfigError(f"PCA was asked to centre on {self.centre!r}. Known: all, classes, pairs.")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"PCA was asked for rank {self.rank}; ranks start at 1, and None chooses one.")

    def _require_rank(self, rank: int, width: int, most: int) -> None:
        if rank > min(width, most):
            what = "complete pairs" if self.centre == "pairs" else "rows"
            raise RankError(
                f"PCA was asked for rank {rank}, but the site has width {width} and its {what} allow at most rank "
                f"{most}. Lower the rank, or add prompts."
            )

    def _rows(self, fitting: Fitting) -> _Evidence:
        """About the overall mean, or about each class's own."""
        acts, within = fitting.acts, self.centre == "classes"
        labels = acts.labels
        counts = torch.bincount(labels, minlength=2).double()
        if within:
            fitting.require_classes()
        if acts.rows.n < 2:
            raise DataError(f"PCA was given {acts.rows.n} rows and needs at least 2. Add prompts.")
        both = bool((counts > 0).all())
        nulls = (self.permuted(acts, self.seed + draw) for draw in range(self.null_draws))
        gaps = _Gaps(torch.stack([labels, *nulls]) if both else labels.new_zeros(0, len(labels)), fitting.width)
        batches = ((block, y if within else torch.zeros_like(y)) for block, y in gaps.watch(fitting.batches()))
        parts = list(class_moments(batches, fitting.width, second=True).values())
        means = torch.stack([part.mean for part in parts])
        free = acts.rows.n - len(parts)
        second = sum((_scatter(part) for part in parts[1:]), _scatter(parts[0])) / max(free, 1)
        return _Evidence(
            second=second,
            origin=means.mean(0),
            most=free,
            units=_even_units(acts, fitting.site, means, second, within=within),
            ddof=len(parts),
            gap=gaps.sums[0] if both else None,
            gap_variance=float((1 / counts).sum()),
            null_gaps=gaps.sums[1:],
        )

    def _pairs(self, fitting: Fitting) -> _Evidence:
        """Differences within pairs, about zero."""
        acts = fitting.acts
        fitting.require_classes()
        pairs = CompletePairs.of(acts.labels, acts.pairs)
        units = pairs.units(acts.groups)
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (self.null_draws, int(units.max()) + 1), generator=generator).double() * 2 - 1
        seen = Moments.empty(fitting.width)
        middle = torch.zeros(fitting.width, dtype=torch.float64)
        flips = torch.zeros(self.null_draws, fitting.width, dtype=torch.float64)
        for numbers, sides in pairs.sides(fitting.batches()):
            differences = sides[:, 1] - sides[:, 0]
            seen = seen.update(differences)
            middle += sides.mean(1).sum(0)
            flips += signs[:, units[numbers]] @ differences
        flips /= len(pairs)
        return _Evidence(
            second=_scatter(seen) / seen.n + torch.outer(seen.mean, seen.mean),
            origin=middle / len(pairs),
            most=len(pairs) - 1,
            units=int(units.max()) + 1,
            ddof=0,
            gap=seen.mean,
            gap_variance=1 / len(pairs),
            null_gaps=flips,
        )

    def _parallel(self, seen: _Evidence) -> ParallelAnalysis | None:
        """Parallel analysis with one row a group; None where one group is all there is."""
        if seen.units <= seen.ddof:
            return None
        return parallel_analysis(seen.second, seen.units, ddof=seen.ddof)

    def _p(
        self, seen: _Evidence, values: Tensor, basis: Tensor, parallel: ParallelAnalysis | None
    ) -> tuple[float, float | None]:
        """P-value behind `found` and the null's 95 % point of its statistic."""
        if not self.null_draws:
            return float("nan"), None
        if self.centre == "pairs" and seen.gap is not None:
            spread = torch.where(values > 0, values, torch.inf).sqrt()
            statistic = float((basis @ seen.gap / spread).square().sum())
            null = (seen.null_gaps @ basis.T / spread).square().sum(1)
            return permutation_p(statistic, null, side="greater"), float(null.quantile(0.95))
        rank = len(values)
        if parallel is None or rank > len(parallel.p):
            return 1.0, None  # more components than independent rows
        # each component against independent coordinates of the same variances: a coordinate that merely varies much has
        # ratio 1, and no direction a larger one than the correlation matrix has eigenvalues
        ratios = values / (basis.square() @ seen.second.diagonal()).clamp(min=1e-300)
        return float(parallel.p_of(ratios).max()), parallel.threshold

    def _warn(self, seen: _Evidence, basis: Tensor, site: Site) -> None:
        """Warn where the classes differ outside of the subspace, and little or no more than by chance inside."""
        share = _share(seen.gap, basis)
        if seen.gap is None or share is None or not self.null_draws:
            return
        (inside, chance_inside), (outside, chance_outside) = _parts(seen, basis)
        if outside <= chance_outside or (inside > chance_inside and share >= LITTLE):
            return
        why, instead = {
            "all": ("What varies most is something else.", "PCA(centre='pairs') or MeanDifference"),
            "classes": ("Centring each class deletes it.", "PCA(centre='pairs') or MeanDifference"),
            "pairs": ("Pairs differ most in something else.", "MeanDifference(paired=True)"),
        }[self.centre]
        warnings.warn(
            f"PCA(centre={self.centre!r}) at {site.short}: outside of the subspace the class means differ by "
            f"{outside:.3g} (without a signal 95 % stay below {chance_outside:.3g}), inside by {inside:.3g} "
            f"(below {chance_inside:.3g}), {share:.1%} of the squared difference. {why} "
            f"For what separates the classes use {instead}.",
            IllusionWarning,
            stacklevel=3,
        )


def _even_units(acts: Activations, site: Site, means: Tensor, second: Tensor, *, within: bool) -> int:
    """How many independent rows of even length the data are worth.

    The groups' shares of all squared deviations are as uneven as those of so many rows: (sum w)^2 / sum w^2, with what
    the lengths of normal rows vary by themselves taken out. One long row or one large group is worth little more than
    one, whatever its number of rows.
    """
    group = acts.groups.unique(return_inverse=True)[1]
    shares = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    start = 0
    for block, labels in acts.batches(site):
        centre = means[labels] if within else means[:1]
        squares = (block.cpu().double() - centre).square().sum(1)
        shares.index_add_(0, group[start : start + len(block)], squares)
        start += len(block)
    if not bool(shares.any()):
        return len(shares)
    normal = 1 + 2 * float(second.square().sum() / second.diagonal().sum() ** 2)
    even = float(shares.sum() ** 2 / shares.square().sum()) * normal
    return max(1, min(len(shares), int(even)))


def _parts(seen: _Evidence, basis: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Length of the class gap and what 95 % of null gaps stay below: inside of the subspace, and outside."""
    gaps = torch.cat([torch.zeros_like(seen.null_gaps[:1]) if seen.gap is None else seen.gap[None], seen.null_gaps])
    inside = gaps @ basis.T
    lengths = inside.norm(dim=1), (gaps - inside @ basis).norm(dim=1)
    first, second = ((float(length[0]), float(length[1:].quantile(0.95))) for length in lengths)
    return first, second


def _scatter(moments: Moments) -> Tensor:
    """The scatter, which these moments were asked to keep."""
    return moments.covariance(ddof=0) * moments.n


def _towards(values: Tensor, vectors: Tensor, seen: _Evidence) -> Float64[Tensor, " k"]:
    """How far label 1 lies along each vector, zero where that is within two standard errors of nothing."""
    if seen.gap is None:
        return torch.zeros_like(values)
    along = vectors @ seen.gap
    return torch.where(along.abs() > 2 * (values * seen.gap_variance).sqrt(), along, 0.0)


def _share(gap: Tensor | None, basis: Tensor) -> float | None:
    if gap is None or not float(gap.norm()) > 0:
        return None
    return min(1.0, float((basis @ gap).square().sum() / gap.square().sum()))


def _spectrum(values: Tensor, rank: int, parallel: ParallelAnalysis | None) -> dict[str, Any]:
    """The leading eigenvalues beside those of noise, as notes."""
    shown = max(rank, _SHOWN)
    return {
        "eigenvalues": values[:shown].tolist(),
        "explained_variance": (values[:rank] / values.sum().clamp(min=1e-300)).tolist(),
        "suggested_rank": None if parallel is None else parallel.rank,
        "correlation_eigenvalues": None if parallel is None else parallel.eigenvalues[:shown].tolist(),
        "noise_eigenvalue_95": None if parallel is None else parallel.threshold,
    }


def _orientation(towards: Tensor) -> str:
    if bool((towards != 0).all()):
        return "towards label 1"
    if not bool((towards != 0).any()):
        return "largest coordinate positive"
    numbers = ", ".join(str(i) for i in (towards != 0).nonzero().flatten().tolist())
    return f"towards label 1 along rows {numbers}; else largest coordinate positive"
