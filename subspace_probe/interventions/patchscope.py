"""How probable an answer is under interventions: at the output, or already in the states of every layer.

The latter is the token-identity patchscope (Ghandeharioun et al. 2024, arXiv:2401.06102): a state is put into a prompt
in which the model repeats words, and what it repeats is what the state says.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import TokenSource
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.interventions.patch import Patch
from subspace_probe.interventions.sources import Source
from subspace_probe.models.hooked import HookedModel


@runtime_checkable
class ReadOut(Protocol):
    """The probability of every prompt's `answer` and `foil`, shape [condition, depth, 2, prompt].

    There is one depth where the output is read, and one for each layer where its states are.
    """

    def __call__(
        self, model: HookedModel, prompts: Sequence[Prompt], conditions: Sequence[Condition]
    ) -> Float[Tensor, "condition depth 2 prompt"]: ...


@final
@dataclass(frozen=True)
class FinalProbability:
    """The probability that the model answers so: softmax of the last token's logits, at the answer's first token.

    Args:
        batch_tokens: how many tokens, pads included and conditions counted, one pass may have.
    """

    batch_tokens: int = 4096

    def __call__(
        self, model: HookedModel, prompts: Sequence[Prompt], conditions: Sequence[Condition]
    ) -> Float[Tensor, "condition 1 2 prompt"]:
        """One depth: the output."""
        metrics = _both(model, prompts)
        return outcomes(model, prompts, conditions, metrics, batch_tokens=self.batch_tokens).transpose(0, 1)[:, None]


@final
@dataclass(frozen=True)
class TokenIdentity:
    """The probability of an answer in the last token's state after each block, by token-identity patchscope.

    The state after block i is put after block i at the last token of a prompt in which the model repeats words, and
    the next token is read. At the last block that is the output's own probability. Whether a model repeats at all is
    for the clean runs to show.

    Args:
        prompt: the prompt of repetitions, whose last token is the state's place; by default `identity_prompt`, made of
            words of the model that no answer begins with.
        batch_tokens: how many tokens, pads included and layers counted, one pass may have.
    """

    prompt: Prompt | None = None
    batch_tokens: int = 4096

    def __call__(
        self, model: HookedModel, prompts: Sequence[Prompt], conditions: Sequence[Condition]
    ) -> Float[Tensor, "condition depth 2 prompt"]:
        """One depth a layer."""
        answers = {word for prompt in prompts for word in (prompt.answer, prompt.foil) if word}
        identity = self.prompt or identity_prompt(model, avoid=answers)
        repeated = [replace(identity, answer=prompt.answer, foil=prompt.foil) for prompt in prompts]
        metrics, sites = _both(model, prompts), [Site(layer) for layer in range(model.spec.n_layers)]
        found: list[Tensor] = []
        for condition in conditions:
            acts = model.capture(
                prompts,
                sites=sites,
                where=LAST,
                interventions=[condition] if condition else [],
                batch_tokens=self.batch_tokens,
            )
            inserted = [Patch(Source.of(acts, site), LAST) for site in sites]
            values = outcomes(model, repeated, inserted, metrics, batch_tokens=self.batch_tokens)
            found.append(values.transpose(0, 1))
        return torch.stack(found)


def identity_prompt(model: HookedModel, *, avoid: Collection[str] = (), n_words: int = 5) -> Prompt:
    """A prompt in which words are repeated, `with -> with ; from -> from ; ?`, to put a state at its last token.

    Words are the first whole words of the vocabulary, for these are frequent ones in most; marks that the tokenizer
    lacks are left out.

    Args:
        avoid: words that must not be among them, such as the answers asked for.

    Raises:
        ConfigError: a tokenizer with too few words.
    """
    tokenizer, words = model.tokenizer, list[str]()
    avoided = {word.strip().split()[0].lower() for word in avoid if word.strip()}
    for number in sorted(tokenizer.get_vocab().values()):
        word = str(tokenizer.decode([number])).strip()
        if not (word.isascii() and word.isalpha() and word.islower() and len(word) > 2) or word in {*avoided, *words}:
            continue
        if model.token_ids([word]) == [number]:  # a whole word, and not the middle of one
            words.append(word)
        if len(words) == n_words:
            break
    else:
        raise ConfigError(
            f"{n_words} words of one token were looked for to make an identity prompt, and {len(words)} were found. "
            "Give a prompt: TokenIdentity(prompt=Prompt(...))."
        )
    arrow, stop = (next((mark for mark in marks if _known(model, mark)), "") for marks in (("->", ":"), (";", ",")))
    pairs = [f"{word} {arrow} {word} {stop}" for word in words]
    return Prompt(text=" ".join(" ".join([*pairs, "?"]).split()), raw=True)


def _known(model: HookedModel, text: str) -> bool:
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and model.tokenizer.unk_token_id not in ids


def _both(model: TokenSource, prompts: Sequence[Prompt]) -> list["_Probability"]:
    words = sorted({word for prompt in prompts for word in (prompt.answer, prompt.foil) if word})
    table = dict(zip(words, model.token_ids(words), strict=True))
    return [_Probability(table, "answer"), _Probability(table, "foil")]


@final
@dataclass(frozen=True, eq=False)
class _Probability:
    """Softmax at the first token of each prompt's `answer` or `foil`."""

    table: dict[str, int]
    field: str
    name: str = "probability"

    def __call__(self, logits: Float[Tensor, "n d_vocab"], prompts: Sequence[Prompt]) -> Float[Tensor, " n"]:
        tokens = torch.tensor([self.table[getattr(prompt, self.field)] for prompt in prompts])
        return logits.double().softmax(-1).gather(-1, tokens[:, None])[:, 0]
