"""Can the answer be read from the state? Ridge regression onto answers, beside answers exchanged between facts.

A probe that is told which answer belongs to which fact can learn that itself, from a state that says no more than which
fact is asked for. Hewitt & Liang 2019 (arXiv:1909.03368) compare with a control task; here facts get each other's
answers, in training and test alike. Only what the true answers have above that is the model's.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.core.errors import DataError

Labelled = tuple[Float[Tensor, "n d"], Int[Tensor, " n"], Int[Tensor, " n"]]
"""States, answers, and the fact that each row asks for."""


@final
@dataclass(frozen=True, eq=False)
class AnswerProbe:
    """What a probe made of held-out rows.

    Attributes:
        right: 1 where the answer was read, shape [n].
        exchanged: accuracy under each exchange of answers between facts, shape [draws].
    """

    right: Float64[Tensor, " n"]
    exchanged: Float64[Tensor, " draws"]


def answer_probe(
    train: Labelled, test: Labelled, *, penalty: float = 1.0, draws: int = 39, seed: int = 0
) -> AnswerProbe:
    """Fit on some rows, read others.

    Least squares from standardised states to one column an answer, in closed form: every exchange of answers shares
    the decomposition.

    Args:
        penalty: of the squared weights, in units of the number of training rows.
        draws: exchanges of answers between facts.

    Raises:
        DataError: fewer than two answers.
    """
    x, answers, facts = train
    names, coded = torch.cat([answers, test[1]]).unique(return_inverse=True)
    if len(names) < 2:
        raise DataError(f"A probe of answers was given {len(names)} of them. It needs two or more.")
    x, held_out = x.double().cpu(), test[0].double().cpu()
    centre, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    x, held_out = (x - centre) / spread, (held_out - centre) / spread
    gram = x @ x.T  # the dual form: rows are few
    smoother = torch.linalg.solve(gram + penalty * len(x) * torch.eye(len(x), dtype=x.dtype), x @ held_out.T).T
    generator = torch.Generator().manual_seed(seed)
    everyone, index = torch.cat([facts, test[2]]).unique(return_inverse=True)
    first = torch.stack([coded[index == fact][0] for fact in range(len(everyone))])

    def right(codes: Tensor) -> Tensor:
        told = torch.nn.functional.one_hot(codes[: len(x)], len(names)).double()
        return ((smoother @ (told - told.mean(0))).argmax(1) == codes[len(x) :]).double()

    exchanged = [right(first[torch.randperm(len(first), generator=generator)][index]).mean() for _ in range(draws)]
    return AnswerProbe(right(coded), torch.stack(exchanged) if exchanged else torch.zeros(0, dtype=torch.float64))
