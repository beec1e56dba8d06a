"""The truth that a token search is held against: every choice of tokens is run, where there are few enough.

No gradient, no target and no part of a search: tokens in, behaviour out.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.protocols import Metric
from subspace_probe.core.tokens import LAST, Where
from subspace_probe.diagnostics.rungs import observe
from subspace_probe.interventions.objectives import free_positions, replaced
from subspace_probe.interventions.token_vectors import usable_ids
from subspace_probe.models.hooked import HookedModel

MOST = 20_000
"""Choices that are run for each prompt, at most."""


@final
@dataclass(frozen=True, eq=False)
class EveryChoice:
    """What every choice of tokens does.

    Attributes:
        ids: every choice, shape [choice, slot].
        flipped: where the metric has another sign than with the tokens that the prompt came with.
    """

    ids: Int[Tensor, "choice slot"]
    flipped: Bool[Tensor, "n choice"]


def every_choice(
    model: HookedModel,
    contrast: Contrast,
    free: Sequence[Where],
    metric: Metric,
    *,
    allowed: Collection[int] | None = None,
    banned: Collection[int] = (),
    most: int = MOST,
) -> EveryChoice:
    """Run every choice of tokens for the free positions on every prompt.

    Args:
        free: the tokens that may be changed, as many in every prompt.
        metric: above 0 for one behaviour, below for the other.
        allowed, banned: which tokens may be used; special ones never are.
        most: choices a prompt.

    Raises:
        ConfigError: more choices than that.
    """
    usable, batch = usable_ids(model, allowed=allowed, banned=banned), model.tokens(contrast)
    positions = free_positions(batch, free)
    count = len(usable) ** positions.shape[1]
    if count > most:
        raise ConfigError(
            f"{len(usable)} tokens for {positions.shape[1]} positions give {count} choices a prompt, and at most "
            f"{most} are run. Allow fewer tokens, or raise most."
        )
    ids = torch.tensor(list(itertools.product(usable.tolist(), repeat=positions.shape[1])))
    before = metric(observe(model, batch, [], LAST).logits, contrast.prompts) > 0
    flipped: list[Tensor] = []
    for row, prompt in enumerate(contrast.prompts):
        rows = replaced(batch.rows([row] * count), positions[[row]].expand(count, -1), ids)
        after = metric(observe(model, rows, [], LAST).logits, [prompt] * count) > 0
        flipped.append(after != before[row])
    return EveryChoice(ids, torch.stack(flipped))
