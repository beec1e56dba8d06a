"""Minimal pairs as they stream by: the mean state of each side of each pair, and which pairs stand for themselves."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from subspace_probe.core.errors import DataError


@final
@dataclass(frozen=True, eq=False)
class CompletePairs:
    """The pairs that have rows of both labels, numbered in the order of their ids.

    Attributes:
        number: which complete pair each row is of, -1 for rows of none; shape [n].
        count: rows of label 0 and of label 1 in each, shape [p, 2].
    """

    number: Int[Tensor, " n"]
    count: Int[Tensor, "p 2"]

    @classmethod
    def of(cls, labels: Int[Tensor, " n"], pairs: Int[Tensor, " n"]) -> "CompletePairs":
        """The complete pairs among all.

        Raises:
            DataError: there is none.
        """
        index = pairs.unique(return_inverse=True)[1]
        size = int(index.max()) + 1 if len(index) else 0
        count = torch.bincount(2 * index + labels, minlength=2 * size).reshape(-1, 2)
        complete = (count > 0).all(1)
        if not bool(complete.any()):
            raise DataError(
                f"Differences within pairs were asked for, but none of {size} pairs has both a positive and a negative "
                "row. Give 'pair' numbers to the prompts, or use a method that needs no pairs."
            )
        renumber = torch.where(complete, complete.cumsum(0) - 1, -1)
        return cls(renumber[index], count[complete])

    def __len__(self) -> int:
        return len(self.count)

    def sides(
        self, batches: Iterable[tuple[Float[Tensor, "b d"], Int[Tensor, " b"]]]
    ) -> Iterator[tuple[Int[Tensor, " some"], Float64[Tensor, "some 2 d"]]]:
        """Each pair once, when its last row has passed: its number, and the mean of its rows of label 0 and 1.

        Only pairs with rows still to come are held, so rows in the order of their pairs cost one block.
        """
        to_come, start = self.count.sum(1), 0
        held: dict[int, Tensor] = {}
        for block, labels in batches:
            number = self.number[start : start + len(block)]
            start += len(block)
            rows = (number >= 0).nonzero().flatten()
            numbers, local = number[rows].unique(return_inverse=True)
            sums = torch.zeros(2 * len(numbers), block.shape[1], dtype=torch.float64)
            sums.index_add_(0, 2 * local + labels[rows], block.cpu()[rows].double())
            sums = sums.reshape(len(numbers), 2, -1)
            whole = torch.bincount(local, minlength=len(numbers)) == self.count[numbers].sum(1)
            to_come.index_add_(0, number[rows], -torch.ones_like(rows))
            done = to_come[numbers] == 0
            for i in (~whole).nonzero().flatten().tolist():
                pair = int(numbers[i])
                sums[i] += held.pop(pair, 0.0)
                if not done[i]:
                    held[pair] = sums[i].clone()
            if bool(done.any()):
                yield numbers[done], sums[done] / self.count[numbers[done], :, None]

    def units(self, groups: Int[Tensor, " n"]) -> Int[Tensor, " p"]:
        """Which pairs share evidence: those that share a group, be it through other pairs; numbered from 0."""
        rows = self.number >= 0
        pair, group = self.number[rows].numpy(), groups[rows].unique(return_inverse=True)[1].numpy() + len(self)
        size = int(group.max()) + 1
        graph = coo_array((np.ones(len(pair)), (pair, group)), shape=(size, size))
        components = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
        return components[: len(self)].unique(return_inverse=True)[1]
