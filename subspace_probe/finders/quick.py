"""Refitting a finder hundreds of times: without its own null, and on labels shuffled the way its design allows."""

from dataclasses import fields, is_dataclass, replace
from typing import Protocol, runtime_checkable

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


def shuffled(finder: Finder, acts: Activations, *, seed: int) -> Activations:
    """The same rows under labels drawn from the null that labels do not matter.

    Rows of one prompt keep one label. A finder with a design (pairs, strata) says itself what may be exchanged.
    """
    alone = acts.rows.n == len(acts.contrast) and bool((acts.prompt.diff() == 1).all())
    if alone and isinstance(finder, Designed):
        labels = finder.permuted(acts, seed)
    else:
        labels = permute_labels(Tensor(acts.contrast.labels).long(), seed=seed)
    return acts.with_labels(tuple(int(label) for label in labels))
