"""Which suffixes change an answer: every one of them is run.

This is the ground truth that a token search is held against. It uses the Hugging Face module alone: no gradient, no
hook and no part of a search.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from subspace_probe.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
@dataclass(frozen=True, eq=False)
class SuffixAnswers:
    """What a model answers with every suffix.

    Args:
        suffixes: ids, [n_suffixes, n_slots], every ordered choice.
        answers: the likeliest next id, [n_prompts, n_suffixes].
    """

    suffixes: Tensor
    answers: Tensor

    def flips(self, declined: int) -> Tensor:
        """Where the answer is another one than ``declined``, bool [n_prompts, n_suffixes]."""
        return self.answers != declined

    def is_suffix(self, ids: Sequence[int]) -> Tensor:
        """Which of the suffixes equals the given one, bool [n_suffixes]."""
        return (self.suffixes == torch.tensor(ids)).all(dim=1)


@torch.no_grad()
def every_suffix(
    model: "PreTrainedModel", prompts: Tensor, *, slots: Sequence[int], allowed: Sequence[int], batch: int = 1600
) -> SuffixAnswers:
    """Run every ordered suffix of allowed ids on every prompt.

    Args:
        model: A causal language model.
        prompts: Ids of equal length, [n_prompts, length]; what stands in the slots is replaced.
        slots: Positions of the free ids.
        allowed: Ids tried in every slot; ``len(allowed) ** len(slots)`` suffixes.
        batch: Rows per forward pass.

    Returns:
        The suffixes and the answers.

    Raises:
        ConfigError: a slot outside the prompts, a slot twice, or no allowed ids.
    """
    length = prompts.shape[1]
    if not slots or len(set(slots)) < len(slots) or not all(0 <= slot < length for slot in slots):
        raise ConfigError(f"The slots are {tuple(slots)}. Give different positions from 0 to {length - 1}.")
    if not allowed:
        raise ConfigError("No ids are allowed in the slots, so there is no suffix to run. Allow at least one.")
    suffixes = torch.cartesian_prod(*[torch.tensor(list(allowed))] * len(slots)).reshape(-1, len(slots))
    answers = torch.empty((len(prompts), len(suffixes)), dtype=torch.long)
    for number, prompt in enumerate(prompts):
        for start in range(0, len(suffixes), batch):
            rows = prompt.repeat(len(suffixes[start : start + batch]), 1)
            rows[:, list(slots)] = suffixes[start : start + batch]
            logits = model(rows, use_cache=False, logits_to_keep=1).logits[:, -1]
            answers[number, start : start + batch] = logits.argmax(dim=-1)
    return SuffixAnswers(suffixes, answers)
