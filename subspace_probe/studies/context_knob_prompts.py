"""The prompts of the study on the context knob: the same questions under written intents, in other words, in none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, final, runtime_checkable

import torch

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.prompts import Message, Prompt
from subspace_probe.core.tokens import LAST, Where, at
from subspace_probe.metrics.pairs import Pairs
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import organism_contrast, organism_contrasts
from subspace_probe.organisms.knob_language import FORMATS

Words = tuple[str, str]
"""How an intent is written: for the prior (label 0) and for the context (label 1)."""


@runtime_checkable
class Settings(Protocol):
    """What the prompts need of the study's settings."""

    @property
    def context_text(self) -> str: ...
    @property
    def prior_text(self) -> str: ...
    @property
    def neutral_text(self) -> str: ...
    @property
    def other_texts(self) -> tuple[str, ...]: ...
    @property
    def n_train(self) -> int: ...
    @property
    def n_validation(self) -> int: ...
    @property
    def n_test(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Prompts:
    """Questions in three parts that share no group, each asked under both intents.

    Attributes:
        formats: how intents are written, by name, the one of the prompts first; "none" is how they are left out.
        others: prompts whose answer the knob must not touch; None where there are none.
        dropped: pairs left out because their two answers begin with the same token.
    """

    train: Contrast
    validation: Contrast
    test: Contrast
    formats: Mapping[str, Words]
    others: Contrast | None = None
    dropped: int = 0
    _made: dict[tuple[str, str], Contrast] = field(default_factory=dict[tuple[str, str], Contrast])

    def under(self, contrast: Contrast, name: str) -> Contrast:
        """The same questions with the intent in another format."""
        first = next(iter(self.formats))
        if name == first:
            return contrast
        if (contrast.key, name) not in self._made:  # one object each time, so that it is hashed once
            self._made[contrast.key, name] = reworded(contrast, self.formats[first], self.formats[name])
        return self._made[contrast.key, name]


def reworded(contrast: Contrast, old: Words, new: Words) -> Contrast:
    """Every prompt with its written intent replaced, the last occurrence in the last user message.

    Raises:
        DataError: prompts that do not contain the words of their label.
    """
    labels, missing = contrast.labels, list[int]()
    prompts: list[Prompt] = []
    for row, (prompt, label) in enumerate(zip(contrast.prompts, labels, strict=True)):
        head, found, tail = prompt.shown.rpartition(old[label])
        missing += [] if found else [row]
        text = f"{head}{new[label]}{tail}"
        bare = replace(prompt, instruction=None, start=None)
        if prompt.messages:
            prompts.append(replace(bare, messages=(*prompt.messages[:-1], Message(role="user", content=text))))
        else:
            prompts.append(replace(bare, text=text))
    if missing:
        row = missing[0]
        raise DataError(
            f"{len(missing)} prompts of {contrast.name!r} do not contain the text of their intent; row {row}, of label "
            f"{labels[row]}, lacks {old[labels[row]]!r}: {contrast.prompts[row].shown[:80]!r}. Set context_text "
            "(label 1) and prior_text (label 0) to the words as they stand in the prompts."
        )
    return replace(contrast, prompts=tuple(prompts))


def prompts_for(model: HookedModel, config: Settings, contrast: Contrast | None) -> Prompts:
    """The organism's own prompts, or the user's split by group.

    Raises:
        ConfigError: no prompts for this model, or no words for its intents.
        DataError: half pairs, or too few.
    """
    organism = model.spec.name.removeprefix("organism:")
    if contrast is None:
        known = organism != model.spec.name and "none" in organism_contrasts(organism)
        if not known:
            raise ConfigError(
                f"The study needs questions with a context that contradicts what {model.spec.name} knows. Give a file "
                "(--contrast) with 'prompt', 'label' (1 where the context counts, 0 where memory does), 'pair' (one "
                "number for both) and 'answer'; or use organism:knob."
            )
        sizes = {"train": config.n_train, "val": config.n_validation, "test": config.n_test}
        parts = [
            organism_contrast(f"{organism}/instruction", split=part, n=n, seed=config.seed) for part, n in sizes.items()
        ]
        others = organism_contrast(f"{organism}/others", split="test", seed=config.seed)
        return Prompts(*parts, formats=FORMATS, others=others)
    whole = _answerable(model, contrast)
    train, rest = whole.split(0.5, seed=config.seed)
    validation, test = rest.split(0.35, seed=config.seed)
    sizes = (config.n_train, config.n_validation, config.n_test)
    parts = [part.first_pairs(n // 2) for part, n in zip((train, validation, test), sizes, strict=True)]
    dropped = len(set(contrast.pairs)) - len(set(whole.pairs))
    return Prompts(*parts, formats=_formats(config), dropped=dropped)


def _formats(config: Settings) -> dict[str, Words]:
    if not config.context_text or not config.prior_text:
        raise ConfigError(
            "The study takes the written intent out of the prompts and must know its words. Set context_text and "
            "prior_text to them (and neutral_text, if something is to stand in their place)."
        )
    formats = {"instruction": (config.prior_text, config.context_text)}
    for number, text in enumerate(config.other_texts, 1):
        prior, found, context = text.partition("|")
        if not found:
            raise ConfigError(f"other_texts holds {text!r}. Write the words for prior and context as 'prior|context'.")
        formats["weight" if number == 1 else f"format {number + 1}"] = (prior, context)
    return {**formats, "none": (config.neutral_text, config.neutral_text)}


def _answerable(model: HookedModel, contrast: Contrast) -> Contrast:
    """Complete pairs whose two answers begin with different tokens, each prompt with its partner's answer as foil."""
    pairs = Pairs.of(contrast)
    if missing := [row for row, prompt in enumerate(contrast.prompts) if not prompt.answer]:
        raise DataError(
            f"{len(missing)} prompts of {contrast.name!r} have no 'answer' (rows {', '.join(map(str, missing[:5]))}). "
            "Give what is right under the prompt's own intent."
        )
    words = sorted({prompt.answer for prompt in contrast.prompts if prompt.answer})
    ids = dict(zip(words, model.token_ids(words), strict=True))
    prompts, kept = list(contrast.prompts), list[int]()
    for rows in pairs.rows.tolist():
        prior, context = (prompts[row].answer or "" for row in rows)
        prompts[rows[0]], prompts[rows[1]] = (
            replace(prompts[row], foil=foil) for row, foil in zip(rows, (context, prior), strict=True)
        )
        kept += rows if ids[prior] != ids[context] else []
    found = replace(contrast, prompts=tuple(prompts)).take(kept)
    found.require_both_classes(least=24)
    return found


def scanned(model: HookedModel, contrast: Contrast, config: Settings) -> list[Where]:
    """The positions of a scan, counted from the end, where the words behind the question are the same in all."""
    count = min(int(model.tokens(contrast.prompts).lengths.min()), config.positions)
    return [LAST if number == 1 else at(-number) for number in range(1, count + 1)]


def confident(contrast: Contrast, right: torch.Tensor) -> Contrast:
    """The pairs that the model answers as told under both intents, as published.

    Raises:
        DataError: fewer than eight.
    """
    pairs = Pairs.of(contrast)
    kept = pairs.rows[pairs.accuracy(right) > 0].flatten().tolist()
    if len(kept) < 16:
        raise DataError(
            f"The model answers {len(kept) // 2} of {len(contrast) // 2} training pairs of {contrast.name!r} as told "
            "under both intents; 8 are needed to look for what carries the intent. It does not heed what is written: "
            "tune it on the intents first, or write them as it was tuned to read them."
        )
    return contrast.take(sorted(kept))


def texts_at(model: HookedModel, contrast: Contrast, positions: Sequence[Where]) -> list[str]:
    """The token at each position, where all prompts agree on it; else nothing."""
    batch = model.tokens(contrast.prompts)
    pads = batch.ids.shape[1] - batch.lengths
    found: list[str] = []
    for where in positions:
        columns = batch.position(where) + pads
        ids = set(batch.ids[torch.arange(batch.size), columns].tolist())
        found.append(model.tokenizer.decode([ids.pop()]) if len(ids) == 1 else "")
    return found
