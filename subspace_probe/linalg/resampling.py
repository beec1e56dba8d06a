"""Uncertainty and chance, distribution-free: bootstrap and binomial intervals, split halves.

Every interval is a triple `(estimate, low, high)`. Rows that are not independent (token positions of one prompt, near
copies) are resampled and split together: pass `clusters` or `groups`, one integer per row. Nulls: `permutations`.
Background: Efron & Tibshirani, *An Introduction to the Bootstrap*, chapters 13 and 14.
"""

# torch leaves its linear algebra untyped and scipy ships no stubs; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float64, Int, Shaped
from scipy.special import betaincinv, ndtr, ndtri
from torch import Tensor

_CELLS = 4_000_000
"""Largest number of entries of one block of resampling weights (32 MB)."""


def bootstrap_interval(
    values: Shaped[Tensor, " n"],
    *,
    clusters: Int[Tensor, " n"] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int,
    statistic: Literal["mean", "median"] = "mean",
) -> tuple[float, float, float]:
    """Bootstrap interval of a mean or median over rows, or over clusters of rows.

    The mean gets the bias-corrected and accelerated (BCa) interval, with the acceleration from leaving out one cluster
    at a time; the median, whose jackknife is inconsistent, the percentile interval.

    Args:
        values: `[n]`; booleans count as 0 and 1. For rates near 0 or 1 prefer `wilson_interval`: constant values give
            an interval of no width here.
        clusters: Cluster of each row; whole clusters are drawn. Give it whenever rows share a prompt or a source.
        level: Coverage.
        draws: Bootstrap samples; 2000 is enough for 95 %, take more beyond 99 %.
        seed: Seed of the local generator.
        statistic: "mean" (of rows, so large clusters weigh more) or "median".

    Returns:
        `(estimate, low, high)`.

    Raises:
        ValueError: If there are fewer than two clusters, or a value is not finite.
    """
    _check_level("bootstrap_interval", level)
    work = values.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(work).all()):
        bad = (~torch.isfinite(work)).nonzero().flatten().tolist()
        raise ValueError(f"bootstrap_interval was given {len(work)} values; rows {bad[:10]} are nan or inf. Drop them.")
    if statistic == "median":
        drawn = bootstrap_statistic(
            lambda index: float(work[index].quantile(0.5)), len(work), clusters=clusters, draws=draws, seed=seed
        )
        return (float(work.quantile(0.5)), *percentile_interval(drawn, level))
    members = cluster_index("bootstrap_interval", len(work), clusters)
    count = int(members.max()) + 1
    totals = torch.zeros(count, dtype=torch.float64).index_add(0, members, work)
    sizes = torch.bincount(members, minlength=count).to(torch.float64)
    parts = [(w @ totals) / (w @ sizes) for w in cluster_weights(count, draws, seed=seed)]
    left_out = (totals.sum() - totals) / (sizes.sum() - sizes)
    estimate = float(totals.sum() / sizes.sum())
    return _bca(estimate, torch.cat(parts), left_out, level)


def bootstrap_statistic(
    fn: Callable[[Int[Tensor, " m"]], float],
    n: int,
    *,
    clusters: Int[Tensor, " n"] | None = None,
    draws: int = 1000,
    seed: int,
) -> Float64[Tensor, " draws"]:
    """The bootstrap distribution of any statistic of rows: `fn` applied to resampled row indices.

    Args:
        fn: From row indices, with repeats, to a number. Called `draws` times.
        n: Number of rows.
        clusters: Cluster of each row; whole clusters are drawn, so the number of indices may vary.
        draws: Bootstrap samples.
        seed: Seed of the local generator.

    Returns:
        `[draws]` float64, in the order drawn; nan where `fn` returned nan.

    Raises:
        ValueError: If there are fewer than two clusters.

    >>> x = torch.arange(10.0)
    >>> len(bootstrap_statistic(lambda index: float(x[index].max()), 10, draws=5, seed=0))
    5
    """
    members = cluster_index("bootstrap_statistic", n, clusters)
    order = torch.argsort(members, stable=True)
    blocks = torch.split(order, torch.bincount(members).tolist())
    generator = torch.Generator().manual_seed(seed)
    results: list[float] = []
    for _ in range(draws):
        picked: list[int] = torch.randint(len(blocks), (len(blocks),), generator=generator).tolist()
        results.append(float(fn(torch.cat([blocks[i] for i in picked]))))
    return torch.tensor(results, dtype=torch.float64)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float, float]:
    """Wilson score interval of a proportion: good coverage on average, also at 0 and `n` successes.

    Returns:
        `(successes / n, low, high)`.

    Raises:
        ValueError: If not `0 <= successes <= n` with `n >= 1`.

    >>> [round(value, 3) for value in wilson_interval(0, 10)]
    [0.0, 0.0, 0.278]
    """
    _check_binomial("wilson_interval", successes, n, level)
    z = float(ndtri((1 + level) / 2))
    p, width = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / width
    half = z / width * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float, float]:
    """Exact binomial interval of a proportion: coverage never below `level`, so wider than Wilson's.

    Returns:
        `(successes / n, low, high)`.

    Raises:
        ValueError: If not `0 <= successes <= n` with `n >= 1`.
    """
    _check_binomial("clopper_pearson", successes, n, level)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return successes / n, low, high


def split_halves(
    n: int, *, groups: Int[Tensor, " n"] | None = None, seed: int
) -> tuple[Int[Tensor, " first"], Int[Tensor, " second"]]:
    """Two random halves of row indices, each in ascending order, with no group in both.

    Groups go one by one, in random order, to the half that is smaller so far.

    Raises:
        ValueError: If there are fewer than two rows or groups.
    """
    members = cluster_index("split_halves", n, groups)
    sizes: list[int] = torch.bincount(members).tolist()
    order: list[int] = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    side, filled = torch.zeros(len(sizes), dtype=torch.bool), [0, 0]
    for group in order:
        half = int(filled[1] < filled[0])
        filled[half] += sizes[group]
        side[group] = bool(half)
    chosen = side[members]
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def cluster_index(asked: str, n: int, clusters: Int[Tensor, " n"] | None) -> Int[Tensor, " n"]:
    """The cluster of each row as 0 .. G-1, in ascending order of id; every row its own where no clusters are given.

    Args:
        asked: The caller's name, for the message.
        n: Number of rows.
        clusters: Any integers, one for each row.

    Raises:
        ValueError: If there are fewer than two clusters, or another number of ids than rows.
    """
    if clusters is not None and len(clusters) != n:
        raise ValueError(
            f"{asked} was asked for {n} rows; {len(clusters)} cluster ids were given. Pass one id for each row."
        )
    members = torch.arange(n) if clusters is None else _index(clusters)
    count = int(members.max()) + 1 if n else 0
    if count < 2:
        raise ValueError(
            f"{asked} needs at least two independent rows or clusters; found {count} among {n} rows. "
            "Add data from other prompts, or cluster less coarsely."
        )
    return members


def cluster_weights(count: int, draws: int, *, seed: int, width: int = 0) -> Iterator[Float64[Tensor, "block count"]]:
    """How often each of `count` clusters is drawn in each bootstrap sample, in blocks of bounded memory.

    Args:
        count: Number of clusters; each sample draws as many, with replacement, so every row sums to `count`.
        draws: Bootstrap samples in all.
        seed: Seed of the local generator.
        width: The caller's own numbers per sample, where more than `count`; blocks are sized by the larger.

    Yields:
        `[block count]` float64, `draws` rows in all.
    """
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _CELLS // max(count, width))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        picked = torch.randint(count, (size, count), generator=generator)
        ones = torch.ones(size, count, dtype=torch.float64)
        yield torch.zeros(size, count, dtype=torch.float64).scatter_add(1, picked, ones)


def percentile_interval(drawn: Float64[Tensor, " draws"], level: float) -> tuple[float, float]:
    """The central `level` range of bootstrap draws: the percentile interval.

    Raises:
        ValueError: If `level` is not between 0 and 1.
    """
    _check_level("percentile_interval", level)
    return _quantiles(drawn, (1 - level) / 2, (1 + level) / 2)


def _bca(estimate: float, drawn: Tensor, left_out: Tensor, level: float) -> tuple[float, float, float]:
    """The BCa interval (Efron & Tibshirani, eq. 14.10); the percentile interval where its correction is undefined."""
    tails = ((1 - level) / 2, (1 + level) / 2)
    below = (float((drawn < estimate).double().mean()) + float((drawn <= estimate).double().mean())) / 2
    spread = left_out.mean() - left_out
    power = float(spread.square().sum()) ** 1.5
    if not 0.0 < below < 1.0 or power == 0.0:
        return (estimate, *_quantiles(drawn, *tails))
    bias, acceleration = float(ndtri(below)), float(spread.pow(3).sum()) / (6 * power)

    def moved(tail: float) -> float:
        z = bias + float(ndtri(tail))
        return float(ndtr(bias + z / max(1 - acceleration * z, 1e-9)))

    return (estimate, *_quantiles(drawn, moved(tails[0]), moved(tails[1])))


def _quantiles(drawn: Tensor, low: float, high: float) -> tuple[float, float]:
    ends = drawn.quantile(torch.tensor([low, high], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def _index(ids: Tensor) -> Tensor:
    """Cluster ids as 0 .. G-1 in ascending order of id, on the CPU."""
    return torch.unique(ids.detach().cpu(), return_inverse=True)[1]


def _check_level(asked: str, level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"{asked} was asked for level {level}; a level lies between 0 and 1. Write 95 % as 0.95.")


def _check_binomial(asked: str, successes: int, n: int, level: float) -> None:
    _check_level(asked, level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"{asked} was asked for {successes} successes in {n} trials; 0 <= successes <= n, n >= 1. Check the counts."
        )
