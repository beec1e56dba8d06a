"""Can answers be read from states before the model says them? A linear map from states to answers, fitted elsewhere.

A probe that is trained on the facts it is asked about learns them itself, from any state that says which fact is
meant: exchange the answers between facts, and it does as well. So the map is fitted on other prompts, with other
answers, as in the tuned lens (Belrose et al. 2023, arXiv:2303.08112): from a state to the row of
the unembedding that stands for the answer. What it reads of a topic it has never seen is in the state.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.core.errors import DataError


@final
@dataclass(frozen=True, eq=False)
class AnswerLens:
    """What a lens read.

    Attributes:
        read: the candidate that each state is nearest to, shape [n].
        shuffled: the same for lenses fitted on shuffled answers, shape [draws, n].
    """

    read: Int[Tensor, " n"]
    shuffled: Int[Tensor, "draws n"]


def answer_lens(
    states: Float[Tensor, "m d"],
    answers: Float[Tensor, "m e"],
    held_out: Float[Tensor, "n d"],
    candidates: Float[Tensor, "c e"],
    *,
    penalty: float = 0.01,
    draws: int = 0,
    seed: int = 0,
) -> AnswerLens:
    """Ridge regression from standardised states to answers, read off at held-out states by the nearest candidate.

    Args:
        states: of prompts that are not about the topic.
        answers: the row of the unembedding that stands for each one's answer.
        held_out: states to read.
        candidates: the rows that stand for the topic's answers; the nearest by cosine is what is read.
        penalty: of the squared weights, in units of the number of rows.
        draws: fits on shuffled answers, which show what a map of the same form reads by chance.

    Raises:
        DataError: fewer than two rows to fit on, or fewer than two candidates.
    """
    if len(states) < 2 or len(candidates) < 2:
        raise DataError(
            f"A lens was given {len(states)} rows to fit on and {len(candidates)} candidates. Two are least."
        )
    x, y = states.double().cpu(), held_out.double().cpu()
    centre, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    x, y = (x - centre) / spread, (y - centre) / spread
    both = _unit(torch.cat([answers, candidates]).double().cpu(), answers.double().cpu().mean(0))
    told, wanted = both[: len(x)], both[len(x) :]
    # the dual form: every shuffle of the answers shares it
    kernel = x @ x.T + penalty * len(x) * torch.eye(len(x), dtype=x.dtype)
    smoother = torch.linalg.solve(kernel, x @ y.T).T
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x), generator=generator) for _ in range(draws)]
    empty = torch.zeros(0, len(y), dtype=torch.long)
    shuffled = torch.stack([_nearest(smoother @ told[order], wanted) for order in orders]) if draws else empty
    return AnswerLens(_nearest(smoother @ told, wanted), shuffled)


def _unit(rows: Float64[Tensor, "n e"], centre: Float64[Tensor, " e"]) -> Float64[Tensor, "n e"]:
    """Rows from a common centre, at unit length."""
    return torch.nn.functional.normalize(rows - centre, dim=1)


def _nearest(found: Float64[Tensor, "n e"], candidates: Float64[Tensor, "c e"]) -> Int[Tensor, " n"]:
    return (found @ candidates.T).argmax(1)
