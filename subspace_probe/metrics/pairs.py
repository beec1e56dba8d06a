"""Whether a model follows both sides of a pair: the same question under both intents, and right only if both are.

Pair accuracy, Minder et al. 2024 (arXiv:2411.07404): a model that always follows the context, whatever it is told, has
an accuracy of one half and a pair accuracy of none.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import DataError


@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """The two rows of every pair.

    Attributes:
        rows: the row of label 0 and the row of label 1, shape [p, 2].
        groups: of the pairs; intervals go by group, shape [p].
    """

    rows: Int[Tensor, "p 2"]
    groups: Int[Tensor, " p"]

    @classmethod
    def of(cls, contrast: Contrast) -> "Pairs":
        """The pairs of a contrast.

        Raises:
            DataError: a pair without exactly one prompt of each label. Half a pair would count as a whole one, and
                twice a side as both.
        """
        found: dict[int, tuple[list[int], list[int]]] = {}
        for row, (pair, label) in enumerate(zip(contrast.pairs, contrast.labels, strict=True)):
            found.setdefault(pair, ([], []))[label].append(row)
        bad = [pair for pair, sides in found.items() if any(len(side) != 1 for side in sides)]
        if bad or not found:
            raise DataError(
                f"{len(bad)} of {len(found)} pairs of {contrast.name!r} do not have exactly one prompt of label 0 and "
                f"one of label 1 (pairs {', '.join(map(str, bad[:5]))}), and half a pair has no pair accuracy. Give "
                "every question twice under one 'pair' number, once for each intent."
            )
        rows = torch.tensor([[sides[0][0], sides[1][0]] for sides in found.values()])
        return cls(rows, torch.tensor(contrast.groups)[rows[:, 0]])

    def __len__(self) -> int:
        return len(self.rows)

    def accuracy(self, right: Float[Tensor, "*c n"] | Bool[Tensor, "*c n"]) -> Float64[Tensor, "*c p"]:
        """1 for every pair that is right on both sides, else the lesser of the two."""
        return right.double()[..., self.rows].amin(-1)

    def swapped(self, right: Float[Tensor, " n"], wrong: Float[Tensor, " n"], *, draws: int, seed: int) -> Tensor:
        """Pair accuracy of whole tests in which each pair's intents are exchanged at random, shape [draws].

        What a model would score if intents meant nothing: the null of the figure.

        Args:
            right: whether each prompt gets its own answer, shape [n].
            wrong: whether it gets the other one of its pair, shape [n].
        """
        generator = torch.Generator().manual_seed(seed)
        turned = torch.rand(draws, len(self), generator=generator) < 0.5
        both, neither = self.accuracy(right), self.accuracy(wrong)
        return torch.where(turned, neither, both).mean(1)


def memorisation_ratio(prior: Float[Tensor, " n"], context: Float[Tensor, " n"]) -> float:
    """Answers from memory among those that are from memory or from the context; NaN where there are neither.

    Longpre et al. 2021 (arXiv:2109.05052).

    Args:
        prior: whether each prompt is answered from memory, shape [n].
        context: whether from the context, shape [n].
    """
    known = float(prior.sum() + context.sum())
    return float(prior.sum()) / known if known else float("nan")
