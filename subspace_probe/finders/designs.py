"""The design of a data set: which combinations of factor values it holds, and what each factor's effects are in it.

Main effects by weighted least squares on the means of the cells, which is least squares on the rows.
Background: Scheffe 1959, *The Analysis of Variance*, chapter 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import final

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from subspace_probe.core.errors import DataError
from subspace_probe.finders.levels import coded

DEFICIENT = 1e-7
"""Singular values of the standardised design below this fraction of the largest count as zero."""


@final
@dataclass(frozen=True, eq=False)
class Design:
    """Cells, and the one-hot columns of each factor over them, standardised.

    Attributes:
        cells: the code of each factor in each cell that occurs, [cells, f].
        counts: rows in each.
        blocks: for each factor its columns times the root of the cells' shares, orthonormal, [cells, m - 1]: collinear
            columns remain only where factors are.
        values: for each factor the columns' value at each of its codes, [m, m - 1].
    """

    cells: Int[Tensor, "cells f"]
    counts: Int[Tensor, " cells"]
    blocks: tuple[Float64[Tensor, "cells _"], ...]
    values: tuple[Float64[Tensor, "_ _"], ...]

    @classmethod
    def of(cls, codes: Int[Tensor, "n f"]) -> "tuple[Design, Int[Tensor, ' n']]":
        """The design of some rows, and the cell of each row."""
        cells, cell, counts = cells_of(codes)
        root = (counts / counts.sum(dtype=torch.float64)).sqrt()
        blocks: list[Tensor] = []
        values: list[Tensor] = []
        for column in cells.T:
            hot = torch.nn.functional.one_hot(column).double()
            centred = torch.eye(hot.shape[1], dtype=torch.float64) - root.square() @ hot
            left, singular, right = torch.linalg.svd(root[:, None] * (hot @ centred), full_matrices=False)
            kept = singular > 1e-9
            blocks.append(left[:, kept])
            values.append(centred @ (right.T[:, kept] / singular[kept]))
        return cls(cells, counts, tuple(blocks), tuple(values)), cell

    @property
    def shares(self) -> Float64[Tensor, " cells"]:
        """The share of the rows that lies in each cell."""
        return self.counts / self.counts.sum(dtype=torch.float64)

    def shares_of(self, factor: int) -> Float64[Tensor, " m"]:
        """The share of the rows that has each value of a factor."""
        out = torch.zeros(len(self.values[factor]), dtype=torch.float64)
        return out.index_add(0, self.cells[:, factor], self.shares)

    @property
    def condition_number(self) -> float:
        """Of the standardised design: 1 where factors are independent, sqrt((1 + r) / (1 - r)) for two binary ones."""
        singular = torch.linalg.svdvals(torch.cat(self.blocks, dim=1))
        columns = sum(block.shape[1] for block in self.blocks)
        deficient = len(singular) < columns or bool(singular[-1] <= DEFICIENT * singular[0])
        return float("inf") if deficient else float(singular[0] / singular[-1])

    def joint_weights(self, factor: int) -> Float64[Tensor, "m cells"]:
        """Weights on the cells' means that give the effect of each value, the other factors held fixed."""
        inverse = torch.linalg.pinv(torch.cat(self.blocks, dim=1), rtol=DEFICIENT)
        start = sum(block.shape[1] for block in self.blocks[:factor])
        own = inverse[start : start + self.blocks[factor].shape[1]]
        return self.values[factor] @ own * self.shares.sqrt()

    def marginal_weights(self, factor: int) -> Float64[Tensor, "m cells"]:
        """Weights on the cells' means that give each value's mean less the mean of all rows."""
        return self.values[factor] @ self.blocks[factor].T * self.shares.sqrt()

    def correlation(self, first: int, second: int) -> float:
        """Between two factors: signed for two binary ones, else the largest canonical correlation."""
        inner = self.blocks[first].T @ self.blocks[second]
        if inner.shape == (1, 1):
            signs = [float(self.values[i][-1, 0] - self.values[i][0, 0]) for i in (first, second)]
            return float(inner) * (1.0 if signs[0] * signs[1] > 0 else -1.0)
        return float(torch.linalg.matrix_norm(inner, 2))

    def require_full_rank(self, columns: Sequence[tuple[str, Int[Tensor, " n"]]]) -> None:
        """Check that every factor can be told from the others.

        Raises:
            DataError: names the factors that cannot, and the combinations of values without prompts.
        """
        if self.condition_number < float("inf"):
            return
        stack = torch.cat(self.blocks, dim=1)
        _, singular, right = torch.linalg.svd(stack, full_matrices=True)
        size = torch.zeros(len(right), dtype=torch.float64)
        size[: len(singular)] = singular
        hidden = right[size <= DEFICIENT * singular[0]].square().sum(dim=0).split([b.shape[1] for b in self.blocks])
        alike = [i for i, weight in enumerate(hidden) if float(weight.sum()) > 1e-6]
        names = [columns[i][0] for i in alike]
        levels = [coded(columns[i][1])[0].tolist() for i in alike]
        present = {tuple(cell) for cell in self.cells[:, alike].tolist()}
        absent = (c for c in product(*(range(len(level)) for level in levels)) if c not in present)
        shown = [
            "(" + ", ".join(f"{n}={v[c]}" for n, v, c in zip(names, levels, cell, strict=True)) + ")"
            for cell in islice(absent, 4)
        ]
        raise DataError(
            f"The effects of {' and '.join(names)} cannot be told apart: each is determined by the others in all "
            f"{int(self.counts.sum())} rows. There are no prompts with {', '.join(shown)}, among others. Add prompts "
            "with such combinations (a 2 x 2 design has all four), or leave a factor out."
        )


def cells_of(
    codes: Int[Tensor, "n f"],
) -> tuple[Int[Tensor, "cells f"], Int[Tensor, " n"], Int[Tensor, " cells"]]:
    """The combinations of codes that occur, in lexical order, the one of each row, and how many rows each has."""
    cell = torch.zeros_like(codes[:, 0])
    for column in codes.T:  # renumbered at each factor, so that many of them do not overflow
        cell = (cell * (int(column.max()) + 1) + column).unique(return_inverse=True)[1]
    counts = torch.bincount(cell)
    cells = codes.new_zeros(len(counts), codes.shape[1])
    cells[cell] = codes
    return cells, cell, counts
