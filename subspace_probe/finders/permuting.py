"""Refitting a finder hundreds of times: without its own null, and on labels shuffled as design and groups allow."""

import warnings
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import components
from subspace_probe.core.errors import SmallSampleWarning
from subspace_probe.core.protocols import Finder

FEWEST = 20
"""Labellings that a design must allow for a p-value of 0.05 to be possible."""


@runtime_checkable
class Designed(Protocol):
    """A finder that says which labels could have been otherwise: those within a pair, or within a stratum."""

    def permuted(self, acts: Activations, seed: int) -> Int[Tensor, " n"]: ...


def quick(finder: Finder) -> Finder:
    """The same finder with `null_draws=0`, where it has that setting.

    Resampling and permutation refit a finder hundreds of times; each refit would otherwise compute its own null.
    """
    if is_dataclass(finder) and not isinstance(finder, type) and any(f.name == "null_draws" for f in fields(finder)):
        return replace(finder, null_draws=0)  # pyright: ignore[reportCallIssue]
    return finder


def permuted_labels(acts: Activations, *, seed: int, strata: Int[Tensor, " n"] | None = None) -> Int[Tensor, " n"]:
    """Labels of the rows, drawn from the null that they do not matter; all rows of a prompt keep one label.

    Args:
        strata: a factor of the rows that is held fixed: labels move only between prompts of one value.
    """
    return permuted_codes(acts, acts.labels, seed=seed, strata=strata)


def permuted_codes(
    acts: Activations, codes: Int[Tensor, " n"], *, seed: int, strata: Int[Tensor, " n"] | None = None
) -> Int[Tensor, " n"]:
    """The same for any factor of the prompts, given by its value in every row."""
    first = _first_rows(acts)
    columns = (torch.tensor(column) for column in (acts.contrast.pairs, acts.contrast.groups))
    held = None if strata is None else strata[first]
    return exchanged(codes[first], *columns, seed=seed, strata=held)[acts.prompt]


def exchanged(
    codes: Int[Tensor, " n"],
    pairs: Int[Tensor, " n"],
    groups: Int[Tensor, " n"],
    *,
    seed: int,
    strata: Int[Tensor, " n"] | None = None,
) -> Int[Tensor, " n"]:
    """Labels of prompts drawn from the null that they do not matter, exchanging only what the design lets vary.

    Prompts joined by a pair or a group share a source, so they are no independent evidence. Joined prompts of one label
    exchange it as a whole, with others that are as many in the same strata. Where every pair among the joined ones has
    two labels, these change places by one coin for all. Otherwise labels move among the joined prompts.

    Args:
        codes: the label of each prompt, or the value of a factor.
        strata: values that are held fixed; no label leaves its own.
    """
    joined = _joined(tuple(pairs.tolist()), tuple(groups.tolist()))
    held = torch.zeros_like(codes) if strata is None else strata.unique(return_inverse=True)[1]
    low, high = _bounds(codes, joined)
    pure, swaps = low == high, _swaps(codes, pairs, held, joined)
    generator = torch.Generator().manual_seed(seed)
    keys, coins, ties = (torch.rand(n, generator=generator) for n in (len(pure), len(pure), len(codes)))

    # pure ones: within each kind, the label of another, in random order
    kind = _kinds(joined, held, pure)
    given, taken = kind.argsort(stable=True), _sorted(kind, keys)
    moved = low.clone()
    moved[given] = low[taken]
    pair_low, pair_high = (bound[_index(pairs)] for bound in _bounds(codes, _index(pairs)))
    swapped = torch.where((coins < 0.5)[joined], pair_low + pair_high - codes, codes)
    # mixed ones: any order within what is joined and in one stratum
    cell = joined * (int(held.max()) + 1) + held
    mixed = torch.empty_like(codes)
    mixed[cell.argsort(stable=True)] = codes[_sorted(cell, ties)]
    return torch.where(pure[joined], moved[joined], torch.where(swaps[joined], swapped, mixed))


@lru_cache(maxsize=64)
def _joined(pairs: tuple[int, ...], groups: tuple[int, ...]) -> Tensor:
    """Which set of prompts joined by pairs and groups each prompt is in, 0 .. m-1."""
    return _index(torch.tensor(components(pairs, groups)))


def _index(ids: Tensor) -> Tensor:
    return ids.unique(return_inverse=True)[1]


def _bounds(values: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value in each unit."""
    start = torch.zeros(int(unit.max()) + 1, dtype=values.dtype)
    low = start.scatter_reduce(0, unit, values, "amin", include_self=False)
    return low, start.scatter_reduce(0, unit, values, "amax", include_self=False)


def _swaps(codes: Tensor, pairs: Tensor, held: Tensor, joined: Tensor) -> Tensor:
    """For each joined set, whether all of its pairs have two labels, and lie in one stratum."""
    pair = _index(pairs)
    (low, high), (first, last) = _bounds(codes, pair), _bounds(held, pair)
    two = (codes == low[pair]) | (codes == high[pair])
    good = two & (low < high)[pair] & (first == last)[pair]
    return _bounds(good.long(), joined)[0].bool()


def _kinds(joined: Tensor, held: Tensor, pure: Tensor) -> Tensor:
    """Joined sets that may exchange their labels: all of one label, and as many in the same strata."""
    strata = int(held.max()) + 1
    if strata == 1:
        return torch.where(pure, 0, 1)
    counts = torch.bincount(joined * strata + held, minlength=len(pure) * strata).view(-1, strata)
    return counts.unique(dim=0, return_inverse=True)[1] * 2 + (~pure).long()


def _sorted(unit: Tensor, keys: Tensor) -> Tensor:
    """Indices by unit, in the order of the keys within each."""
    order = keys.argsort()
    return order[unit[order].argsort(stable=True)]


def _first_rows(acts: Activations) -> Int[Tensor, " prompts"]:
    """One row of each prompt; a prompt that has none is given another's, which nobody reads."""
    first = torch.zeros(len(acts.contrast), dtype=torch.long)
    return first.scatter_(0, acts.prompt.flip(0), torch.arange(acts.rows.n).flip(0))


def require_enough(drawn: Int[Tensor, "draws n"], name: str) -> None:
    """Warn where so few labellings are possible, or drawn, that no p-value could be 0.05."""
    distinct = len(drawn.unique(dim=0))
    few = (
        "draws were asked for" if len(drawn) < FEWEST - 1 else "labellings are all that pairs, groups and strata allow"
    )
    if len(drawn) < FEWEST - 1 or distinct < FEWEST - 1:
        warnings.warn(
            f"{name} could not be tested: {distinct} {few}, and a p-value of 0.05 takes {FEWEST - 1} besides the true "
            "one. It is marked as not found. Add prompts, or draws.",
            SmallSampleWarning,
            stacklevel=4,
        )


def shuffled(finder: Finder, acts: Activations, *, seed: int) -> Activations:
    """The same rows under labels drawn from the null that labels do not matter.

    Rows of one prompt keep one label. A finder with a design (pairs, strata) says itself what may be exchanged.
    """
    drawn = finder.permuted(acts, seed) if isinstance(finder, Designed) else permuted_labels(acts, seed=seed)
    labels = torch.tensor(acts.contrast.labels).scatter_(0, acts.prompt, drawn)
    return acts.with_labels(tuple(int(label) for label in labels))
