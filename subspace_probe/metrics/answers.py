"""Metrics of prompts that carry their own answer."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.errors import DataError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import TokenSource


@final
class LogitDifference:
    """Logit of a prompt's `answer` minus that of its `foil`; first tokens."""

    name = "logit_difference"

    def __init__(self, model: TokenSource) -> None:
        self._model = model

    def __call__(self, logits: Float[Tensor, "n d_vocab"], prompts: Sequence[Prompt]) -> Float[Tensor, " n"]:
        answer, foil = (_ids(self._model, prompts, field) for field in ("answer", "foil"))
        rows = torch.arange(len(prompts))
        return (logits[rows, answer] - logits[rows, foil]).double()

    def tokens(self, prompts: Sequence[Prompt]) -> Int[Tensor, "n 2"]:
        """The only tokens whose logits it reads of each prompt, so that no others need be computed."""
        return torch.stack([_ids(self._model, prompts, field) for field in ("answer", "foil")], dim=1)


@final
class Accuracy:
    """1 where the most likely next token is the first token of the prompt's `answer`, else 0."""

    name = "accuracy"

    def __init__(self, model: TokenSource) -> None:
        self._model = model

    def __call__(self, logits: Float[Tensor, "n d_vocab"], prompts: Sequence[Prompt]) -> Float[Tensor, " n"]:
        return (logits.argmax(-1) == _ids(self._model, prompts, "answer")).double()


def _ids(model: TokenSource, prompts: Sequence[Prompt], field: str) -> Tensor:
    words = [getattr(prompt, field) for prompt in prompts]
    missing = [row for row, word in enumerate(words) if not word]
    if missing:
        raise DataError(
            f"The metric needs {field!r} of every prompt, but {len(missing)} of {len(words)} have none; the first is "
            f"{prompts[missing[0]].shown[:60]!r}. Add a column {field!r}, or choose another metric."
        )
    distinct = sorted(set(words))
    table = dict(zip(distinct, model.token_ids(distinct), strict=True))
    return torch.tensor([table[word] for word in words])
