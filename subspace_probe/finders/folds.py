"""Cross-validation that keeps pairs and groups together."""

import torch
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor


def group_folds(
    values: Int[Tensor, " n"], pairs: Int[Tensor, " n"], groups: Int[Tensor, " n"], *, most: int
) -> Int[Tensor, " n"]:
    """The fold of each row, 0 .. k-1, for k at most `most` and at most the number of groups of the rarest value.

    Rows that share a pair or a group stay together. The groups are dealt out like cards, sorted by the values they
    hold and then by their number, so that every fold gets its share of each kind; row order does not matter.

    Returns:
        One fold for all rows where some value lies in a single group: there is nothing to hold out.
    """
    block = _joined(pairs, groups)
    held: dict[int, set[int]] = {}
    for name, value in zip(block.tolist(), values.tolist(), strict=True):
        held.setdefault(name, set()).add(value)
    kinds = {value: sum(value in inside for inside in held.values()) for value in set(values.tolist())}
    k = max(1, min(most, *kinds.values()))
    dealt = sorted(held, key=lambda name: (sorted(held[name]), name))
    fold = torch.zeros(int(block.max()) + 1, dtype=torch.long)
    fold[torch.tensor(dealt)] = torch.arange(len(dealt)) % k
    return fold[block]


def _joined(pairs: Tensor, groups: Tensor) -> Int[Tensor, " n"]:
    """Rows joined by a shared pair or group carry the same number, numbered by their smallest group."""
    _, pair = pairs.unique(return_inverse=True)
    _, group = groups.unique(return_inverse=True)
    n_groups, n_pairs = int(group.max()) + 1, int(pair.max()) + 1
    edges = (torch.ones(len(pair)).numpy(), (group.numpy(), (n_groups + pair).numpy()))
    size = n_groups + n_pairs
    _, part = connected_components(coo_array(edges, shape=(size, size)), directed=False)
    return torch.from_numpy(part).long()[group]
