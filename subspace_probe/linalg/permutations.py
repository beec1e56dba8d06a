"""Chance by permutation: labels drawn as if they did not matter, and p-values against such draws.

The design decides what may be exchanged: a minimal pair swaps its labels, near copies move together.
Background: Phipson & Smyth 2010, https://arxiv.org/abs/1603.05766 (why a permutation p-value is never zero).
"""

# torch leaves parts of itself untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


def permutation_p(
    observed: float, null: Float[Tensor, " m"], *, side: Literal["two", "greater", "less"] = "two"
) -> float:
    """P-value of `observed` against draws of its null: `(1 + #{null at least as extreme}) / (1 + m)`, never zero.

    Args:
        observed: The statistic on the data as they are.
        null: `[m]`, the statistic on permuted data. Its centre need not be zero.
        side: "greater" counts draws >= observed, "less" draws <= observed, "two" doubles the smaller (at most 1).

    Raises:
        ValueError: If `null` is empty or anything is nan.

    >>> permutation_p(3.0, torch.tensor([0.0, 1.0, 2.0]), side="greater")
    0.25
    """
    work = null.detach().to("cpu", torch.float64)
    if len(work) == 0 or bool(work.isnan().any()) or observed != observed:
        raise ValueError(
            f"permutation_p was given observed={observed} and {len(work)} draws ({int(work.isnan().sum())} nan); "
            "it needs at least one draw and no nan. Drop permutations where the statistic is undefined."
        )
    slack = 1e-12 * abs(observed)  # draws that equal the observed value up to rounding count as ties
    greater = (1 + int((work >= observed - slack).sum())) / (1 + len(work))
    less = (1 + int((work <= observed + slack).sum())) / (1 + len(work))
    return {"greater": greater, "less": less, "two": min(1.0, 2 * min(greater, less))}[side]


def permute_labels(
    labels: Int[Tensor, " n"],
    *,
    pairs: Int[Tensor, " n"] | None = None,
    groups: Int[Tensor, " n"] | None = None,
    seed: int,
) -> Int[Tensor, " n"]:
    """One draw of labels under the null that they do not matter, keeping what the design keeps.

    Alone, labels are shuffled over rows. With `pairs`, the two labels of a pair change places or not, by a fair coin
    (one coin for each group where `groups` are given too). With `groups` alone, groups exchange their labels.

    Args:
        labels: `[n]`.
        pairs: Minimal pair of each row; a pair may have many rows, but at most two distinct labels.
        groups: Rows that are near copies and must move together.
        seed: Seed of the local generator.

    Returns:
        `[n]`, in the dtype of `labels`. Class counts change when groups of unequal size exchange labels.

    Raises:
        ValueError: If a pair has more than two labels or lies in two groups, or a group alone has more than one label.
    """
    generator = torch.Generator().manual_seed(seed)
    if pairs is None:
        unit = torch.arange(len(labels)) if groups is None else _index(groups)
        low, high = _extremes(labels, unit)
        if not torch.equal(low, high):
            raise ValueError(
                f"permute_labels was asked to exchange labels between groups; {int((low != high).sum())} groups "
                "hold more than one label. Pass `pairs` as well, so that labels change places inside each pair."
            )
        shuffled = low[torch.randperm(len(low), generator=generator)]
        return shuffled[unit].to(labels.device, labels.dtype)
    pair = _index(pairs)
    low, high = (bound[pair] for bound in _extremes(labels, pair))
    work = labels.cpu().long()
    if not bool(((work == low) | (work == high)).all()):
        raise ValueError("permute_labels swaps the two labels of a pair; some pair has three or more. Split that pair.")
    unit = pair if groups is None else _index(groups)
    first, last = _extremes(unit, pair)
    if not torch.equal(first, last):
        raise ValueError(
            f"permute_labels moves groups together; {int((first != last).sum())} pairs lie in more than one group. "
            "Give the rows of a pair the same group."
        )
    coin = torch.rand(int(unit.max()) + 1, generator=generator)[unit] < 0.5
    return torch.where(coin, low + high - work, work).to(labels.device, labels.dtype)


def _index(ids: Tensor) -> Tensor:
    """Ids as 0 .. G-1 in ascending order, on the CPU."""
    return torch.unique(ids.detach().cpu(), return_inverse=True)[1]


def _extremes(labels: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest label in each unit."""
    work = labels.detach().cpu().long()
    start = torch.zeros(int(unit.max()) + 1 if len(unit) else 0, dtype=torch.long)
    low = start.scatter_reduce(0, unit, work, "amin", include_self=False)
    return low, start.scatter_reduce(0, unit, work, "amax", include_self=False)
