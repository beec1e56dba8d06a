"""Two halves of natural pairs that share no group, so that what is fitted on one is judged on the other."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subspace_probe.diagnostics.natural import Natural


def halves(pairs: Natural, *, seed: int) -> tuple[Bool[Tensor, " rows"], Bool[Tensor, " rows"]] | None:
    """Which rows belong to either half; None where all pairs are of one group."""
    groups = torch.tensor(pairs.prompts.groups)[pairs.prompt]
    units = groups.unique()
    if len(units) < 2:
        return None
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
    first = torch.isin(groups, units[order[: len(units) // 2]])
    return first, ~first


def by_prompt(pairs: Natural, rows: Float[Tensor, " rows"]) -> Float[Tensor, " n"]:
    """The sum over each prompt's rows."""
    return torch.zeros(len(pairs), dtype=torch.float64).index_add(0, pairs.prompt, rows.double())
