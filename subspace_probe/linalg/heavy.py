"""Rows so long that each alone could be a component: the first token of a text, massive activations.

Four such rows among two thousand take the first principal component, whatever the others say.
Background: Kacham & Woodruff 2024, "Approximating the Top Eigenvector in Random Order Streams" (heavy rows).
"""

# torch leaves parts of itself untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def heavy_rows(batches: Iterable[Float[Tensor, "_ d"]]) -> Int[Tensor, " k"]:
    """Which rows hold at least `1 / d` of the sum of squares of all rows: `||a_i||^2 >= ||A||_F^2 / d`.

    That is the share of an average direction. The threshold is the paper's `||A||_F / sqrt(d polylog d)` without the
    logarithms. Lengths are taken about zero. One pass; only one number a row is kept.

    Args:
        batches: Rows `[rows d]`, each batch of any length.

    Returns:
        `[k]`, indices in ascending order; empty where all rows are zero.

    Raises:
        ValueError: If there are not more rows than coordinates (then the average row would count as heavy), or a row
            holds nan or inf.
    """
    squares: list[Tensor] = []
    d = 0
    for batch in batches:
        d = batch.shape[1]
        squares.append(torch.linalg.vector_norm(batch.detach(), dim=1, dtype=torch.float64).cpu().square())
    lengths = torch.cat(squares) if squares else torch.zeros(0, dtype=torch.float64)
    if len(lengths) <= d:
        raise ValueError(
            f"heavy_rows was given {len(lengths)} rows of width {d}; with no more rows than coordinates the average "
            "row holds a d-th of the whole. Take more rows (more tokens of each prompt)."
        )
    if not bool(lengths.isfinite().all()):
        bad = (~lengths.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"heavy_rows was given {len(lengths)} rows; rows {bad[:10]} hold nan or inf. Drop them.")
    return ((lengths >= lengths.sum() / d) & (lengths > 0)).nonzero().flatten()
