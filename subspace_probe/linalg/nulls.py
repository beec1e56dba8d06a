"""How far apart chance would put two directions or two subspaces: by the data's own covariance, or by none.

Activations vary along few directions, so unrelated directions of the same data have cosines far above what the
dimension alone would give: in 768 dimensions with a 1/i spectrum a cosine of 0.3 is noise. The isotropic closed forms
are kept for contrast and for weights, where nothing better is known. Results are float64 on the CPU.
Background: Johnstone 2008, https://arxiv.org/abs/0803.3408 (the largest principal cosine of random subspaces).
"""

# torch leaves its linear algebra untyped and scipy ships no stubs; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

import torch
from jaxtyping import Float, Float64
from scipy.special import betaincinv
from torch import Tensor

from subspace_probe.linalg.bases import square_root

_CELLS = 8_000_000
"""Largest number of entries of the random rows drawn at a time (64 MB)."""


def cosine_null(
    covariance: Float[Tensor, "d d"], *, covariance_b: Float[Tensor, "d d"] | None = None, n: int = 1000, seed: int
) -> Float64[Tensor, " n"]:
    """Signed cosines between `n` random pairs of directions, every direction drawn from N(0, `covariance`).

    What two unrelated directions of this data look like. Wider than the isotropic formula, because activations vary
    along few directions: judged by the isotropic one, unrelated directions appear related.

    Args:
        covariance: `[d d]`, of the activations the directions were found in.
        covariance_b: `[d d]`, of those the second direction of each pair was found in, where they are others.
        n: Number of pairs.
        seed: Seed of the local generator.

    Returns:
        `[n]` float64.

    Raises:
        ValueError: As `covariance_matched_directions`, or if the widths differ.
    """
    return _inner("cosine_null", covariance, covariance_b, (1, 1), n, seed)[:, 0, 0].clamp(-1.0, 1.0)


def overlap_null(
    covariance: Float[Tensor, "d d"],
    k: int,
    l: int,  # noqa: E741
    *,
    covariance_b: Float[Tensor, "d d"] | None = None,
    n: int = 1000,
    seed: int,
) -> Float64[Tensor, " n"]:
    """`overlap` between the spans of `k` and of `l` random directions of N(0, `covariance`), drawn `n` times.

    For the identity its mean is `chance_overlap(k, l, d)`; for the covariance of activations it lies far above.

    Args:
        covariance: `[d d]`, of the activations the subspaces were found in.
        k: Rank of the first.
        l: Rank of the second.
        covariance_b: `[d d]`, of the activations the second one was found in, where they are others.
        n: Number of pairs of subspaces; each costs O(d (k + l)^2).
        seed: Seed of the local generator.

    Returns:
        `[n]` float64, in [0, 1].

    Raises:
        ValueError: As `covariance_matched_directions`, or if a rank is above that of its covariance.
    """
    inner = _inner("overlap_null", covariance, covariance_b, (k, l), n, seed)
    return (inner.square().sum(dim=(1, 2)) / min(k, l)).clamp(max=1.0)


def isotropic_overlap_null(d: int, k: int, l: int, *, n: int = 1000, seed: int) -> Float64[Tensor, " n"]:  # noqa: E741
    """`overlap_null` of white data, without a covariance: `overlap` of uniform random subspaces, drawn `n` times.

    The distribution is that of a random subspace and a fixed one, so only the smaller is drawn, and the other is the
    first coordinates. For weights, whose output spaces may be far too wide for a matrix `[d d]`.

    Args:
        d: Width of the space.
        k: Rank of the first.
        l: Rank of the second.
        n: Number of pairs of subspaces; each costs O(d min(k, l)^2).
        seed: Seed of the local generator.

    Returns:
        `[n]` float64, in [0, 1], of mean `chance_overlap(k, l, d)`.

    Raises:
        ValueError: If not `1 <= k, l <= d`, or `n < 1`.
    """
    chance_overlap(k, l, d)  # checks the ranks
    if n < 1:
        raise ValueError(f"isotropic_overlap_null was asked for n={n} draws; it needs at least 1. Raise it.")
    small, large = min(k, l), max(k, l)
    generator = torch.Generator().manual_seed(seed)
    size = max(1, _CELLS // (d * small))
    parts: list[Tensor] = []
    for start in range(0, n, size):
        count = min(size, n - start)
        frames = torch.linalg.qr(torch.randn(count, d, small, generator=generator, dtype=torch.float64))[0]
        parts.append(frames[:, :large].square().sum(dim=(1, 2)) / small)
    return torch.cat(parts).clamp(max=1.0)


def top_cosine_null(
    covariance: Float[Tensor, "d d"],
    k: int,
    l: int,  # noqa: E741
    *,
    covariance_b: Float[Tensor, "d d"] | None = None,
    n: int = 1000,
    seed: int,
) -> Float64[Tensor, " n"]:
    """The largest principal cosine of the pairs of subspaces of `overlap_null` (the same draws for the same seed).

    Large subspaces always share a direction nearly: two random 100-dimensional ones of 768 dimensions have a largest
    principal cosine of 0.66, and where k + l > d it is 1.

    Raises:
        ValueError: As `overlap_null`.
    """
    inner = _inner("top_cosine_null", covariance, covariance_b, (k, l), n, seed)
    return torch.linalg.svdvals(inner)[:, 0].clamp(max=1.0)


def chance_overlap(k: int, l: int, d: int) -> float:  # noqa: E741
    """Expected `overlap` of a random rank-`k` and a fixed rank-`l` subspace of `d` dimensions: `max(k, l) / d`.

    From E ||A B^T||_F^2 = k l / d for a Haar-random A.

    Raises:
        ValueError: If not `1 <= k, l <= d`.

    >>> chance_overlap(2, 5, 100)
    0.05
    """
    if not (1 <= k <= d and 1 <= l <= d):
        raise ValueError(f"chance_overlap was asked for ranks {k} and {l} in {d} dimensions; ranks run from 1 to {d}.")
    return max(k, l) / d


def isotropic_cosine_quantile(d: int, q: float) -> float:
    """The `q` quantile of the signed cosine between two uniform random directions of width `d`.

    Closed form: `(1 + cos) / 2` follows Beta((d-1)/2, (d-1)/2).

    Args:
        d: Width, at least 2.
        q: Probability; 0.975 gives the edge of the central 95 % range.

    Raises:
        ValueError: If `d < 2` or `q` is outside [0, 1].
    """
    if d < 2 or not 0.0 <= q <= 1.0:
        raise ValueError(
            f"isotropic_cosine_quantile was asked for d={d}, q={q}; it needs d >= 2 and q in [0, 1]. Change them."
        )
    half = (d - 1) / 2
    return 2.0 * float(betaincinv(half, half, q)) - 1.0


def _inner(
    asked: str, covariance: Tensor, covariance_b: Tensor | None, ranks: tuple[int, int], n: int, seed: int
) -> Float64[Tensor, "n k l"]:
    """`A B^T` of orthonormal bases of the spans of random directions, `n` times."""
    d = len(covariance)
    if covariance_b is not None and len(covariance_b) != d:
        raise ValueError(
            f"{asked} was given covariances of widths {d} and {len(covariance_b)}; they must be equal. "
            "Compare at sites of one width."
        )
    if n < 1:
        raise ValueError(f"{asked} was asked for n={n} draws; it needs at least 1. Raise it.")
    root = _support(asked, covariance, ranks if covariance_b is None else ranks[:1])
    root_b = root if covariance_b is None else _support(asked, covariance_b, ranks[1:])
    generator = torch.Generator().manual_seed(seed)
    size = max(1, _CELLS // (d * sum(ranks)))
    parts: list[Tensor] = []
    for start in range(0, n, size):
        count = min(size, n - start)
        a, b = (_frames(count, rank, r, generator) for rank, r in zip(ranks, (root, root_b), strict=True))
        parts.append(a.mT @ b)
    return torch.cat(parts)


def _frames(count: int, k: int, root: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns `[count d k]` that span `k` draws from N(0, root root^T)."""
    drawn = root @ torch.randn(count, root.shape[1], k, generator=generator, dtype=torch.float64)
    if k == 1:
        return drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
    return torch.linalg.qr(drawn)[0]


def _support(asked: str, covariance: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """A factor of the covariance without its empty columns, after checking that as many directions fit in."""
    root = square_root(covariance)
    lengths = torch.linalg.vector_norm(root, dim=0)
    root = root[:, lengths > 1e-6 * lengths.max()]
    if not 1 <= min(ranks) <= max(ranks) <= root.shape[1]:
        raise ValueError(
            f"{asked} was asked for subspaces of rank {' and '.join(map(str, ranks))}, but the covariance of width "
            f"{len(covariance)} has rank {root.shape[1]}. Take it over more rows, or compare fewer directions."
        )
    return root
