"""Is a steered text still one that the model could have written? Two measures, and where they say no.

Too strong an edit shows in one of two ways: the text goes round in circles, which the unsteered model finds easy to
predict, or it is salad, which does not repeat. So both are measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.edits import compose
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Intervention, require_scopes
from subspace_probe.core.tokens import TokenBatch
from subspace_probe.models.capturing import Limits, batches
from subspace_probe.models.hooked import HookedModel

NGRAM = 3
_BATCH = Limits(tokens=2048)  # all tokens of a text are unembedded


@final
@dataclass(frozen=True)
class Fluency:
    """Means over texts.

    Attributes:
        repeated: share of n-grams that occurred before in the same text, 0 to 1.
        loss: nats a token under the unsteered model.
    """

    repeated: float
    loss: float

    def limits(self, vocabulary: int, tolerance: float) -> "Fluency":
        """How far a text may be from this one, the unsteered: `tolerance` of the way to the worst there is.

        The worst are a text of which every n-gram repeats, and tokens drawn at random, which cost ln(vocabulary) nats
        each. Where unsteered text costs more than `tolerance` of that, the model knows too little to tell, and its
        loss is not used.
        """
        worst = math.log(vocabulary)
        loss = self.loss + tolerance * (worst - self.loss) if self.loss <= tolerance * worst else math.inf
        return Fluency(self.repeated + tolerance * (1 - self.repeated), loss)

    def exceeds(self, limits: "Fluency") -> bool:
        """Whether a text is beyond either limit."""
        return self.repeated > limits.repeated or self.loss > limits.loss


def fluency(model: HookedModel, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]) -> Fluency:
    """Both measures of continuations, under the model as it is given."""
    repeats = [repeated(ids) for ids in continuations]
    return Fluency(sum(repeats) / len(repeats), float(losses(model, prompts, continuations).mean()))


def repeated(ids: Sequence[int], n: int = NGRAM) -> float:
    """1 - distinct n-grams / n-grams (seq-rep-n, Welleck et al. 2020, arXiv:1908.04319); 0 for texts too short.

    >>> repeated([1, 2, 3, 1, 2, 3])
    0.25
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def losses(
    model: HookedModel, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
) -> Float[Tensor, " n"]:
    """Mean negative log-likelihood of the tokens of each continuation, in nats a token, shape [n]."""
    batch = model.tokens(prompts)
    lengths = [int(length) + len(ids) for length, ids in zip(batch.lengths, continuations, strict=True)]
    out = torch.zeros(len(lengths), dtype=torch.float64)
    for rows in batches(lengths, _BATCH):
        part, target, real = _continued(batch.rows(rows), [continuations[row] for row in rows])
        logits = model.run(part, logits_to_keep=target.shape[1] + 1).logits
        if logits is None:
            raise ConfigError(f"{model.spec.family} gives no logits, so its texts have no loss. Use a decoder model.")
        told = logits[:, :-1].cpu().double().log_softmax(-1).gather(-1, target[..., None])[..., 0]
        out[rows] = -(told * real).sum(-1) / real.sum(-1).clamp(min=1)
    return out


def _continued(batch: TokenBatch, continuations: Sequence[Sequence[int]]) -> tuple[TokenBatch, Tensor, Tensor]:
    """Prompts with their continuations behind them, the continuations' ids, and which of these are real."""
    longest = max(1, *map(len, continuations))
    target = torch.zeros(len(continuations), longest, dtype=batch.ids.dtype)
    real = torch.zeros(len(continuations), longest, dtype=torch.bool)
    for row, ids in enumerate(continuations):
        target[row, : len(ids)], real[row, : len(ids)] = torch.tensor(list(ids), dtype=target.dtype), True
    ids, mask = torch.cat([batch.ids.cpu(), target], 1), torch.cat([batch.mask.cpu(), real], 1)
    return replace(batch, ids=ids, mask=mask), target, real


def continuations(
    model: HookedModel, prompts: Sequence[Prompt], interventions: Sequence[Intervention], *, max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations as token ids, their end token included.

    Raises:
        ConfigError: a model with standing interventions, whose own text is no unsteered one.
    """
    if model.standing_sites:
        raise ConfigError("The model has standing interventions. Give the plain model, to compare with unsteered text.")
    batch, found = model.tokens(prompts), [list[int]()] * len(prompts)
    for intervention in interventions:
        model.check(intervention)
    require_scopes(batch, interventions, new=max_new_tokens)
    edits = compose(*(intervention.edits(model.spec.n_layers) for intervention in interventions))
    for rows in batches(batch.lengths.tolist(), Limits()):
        made = model.backend.generate(batch.rows(rows), writes=edits, max_new_tokens=max_new_tokens)
        for row, ids, length in zip(rows, made.ids.tolist(), made.lengths.tolist(), strict=True):
            found[row] = ids[:length]
    return found
