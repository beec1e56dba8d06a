"""Refitting a finder hundreds of times: without its own null, and on labels shuffled as design and groups allow."""

from dataclasses import fields, is_dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.protocols import Finder
from subspace_probe.linalg.permutations import permute_labels


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


def exchanged(labels: Int[Tensor, " n"], pairs: Int[Tensor, " n"], groups: Int[Tensor, " n"], *, seed: int) -> Tensor:
    """Labels drawn from the null that they do not matter, exchanging only what the grouping lets vary.

    Rows of a group share a source, so they are no independent evidence. Groups of one label exchange it as a whole;
    where every pair has both labels, whole groups swap theirs by a fair coin; else labels move within their group.
    """
    _, group = groups.unique(return_inverse=True)
    _, pair = pairs.unique(return_inverse=True)
    if int(group.max()) + 1 == len(labels):
        return permute_labels(labels, seed=seed)
    size, positive = (torch.bincount(group, weights=w) for w in (torch.ones(len(labels)), labels.double()))
    if bool(((positive == 0) | (positive == size)).all()):
        return permute_labels(labels, groups=groups, seed=seed)
    size, positive = (torch.bincount(pair, weights=w) for w in (torch.ones(len(labels)), labels.double()))
    nested = torch.stack([pairs, groups]).unique(dim=1).shape[1] == len(pairs.unique())
    if nested and bool(((positive > 0) & (positive < size)).all()):
        return permute_labels(labels, pairs=pairs, groups=groups, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    # sorting a shuffle by group keeps groups together and their members in random order
    source = order[group[order].argsort(stable=True)]
    out = torch.empty_like(labels)
    out[group.argsort(stable=True)] = labels[source]
    return out


def shuffled(finder: Finder, acts: Activations, *, seed: int) -> Activations:
    """The same rows under labels drawn from the null that labels do not matter.

    Rows of one prompt keep one label. A finder with a design (pairs, strata) says itself what may be exchanged.
    """
    alone = acts.rows.n == len(acts.contrast) and bool((acts.prompt.diff() == 1).all())
    if alone and isinstance(finder, Designed):
        labels = finder.permuted(acts, seed)
    else:
        contrast = acts.contrast
        columns = (torch.tensor(column) for column in (contrast.labels, contrast.pairs, contrast.groups))
        labels = exchanged(*columns, seed=seed)
    return acts.with_labels(tuple(int(label) for label in labels))
