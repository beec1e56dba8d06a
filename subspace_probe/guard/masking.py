"""Prompts with words replaced by others, their instruction found again."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from subspace_probe.core.prompts import Message, Prompt
from subspace_probe.guard.baselines import WORD, BagOfWords, text_of

KEYWORDS = 50


def keywords_of(bag: BagOfWords, n: int = KEYWORDS) -> tuple[str, ...]:
    """The single words that speak most for the positive class, at most so many."""
    order = np.argsort(-bag.weights, kind="stable")
    single = [bag.words[i] for i in order if bag.weights[i] > 0 and " " not in bag.words[i]]
    return tuple(single[:n])


def stand_ins(words: Sequence[str], bag: BagOfWords) -> dict[str, str]:
    """For each word a neutral one of the training prompts, as near in length as there is.

    Neutral is a word whose weight is among the smaller half in size. A word that the model knows is needed: an unknown
    token would be a change of its own.
    """
    size = np.abs(bag.weights)
    single = [i for i, word in enumerate(bag.words) if " " not in word and word not in set(words)]
    if not single:
        return {}
    middle = float(np.median(size[single]))
    neutral = sorted((i for i in single if size[i] <= middle), key=lambda i: (size[i], bag.words[i]))
    return {
        word: bag.words[min(neutral, key=lambda i: (abs(len(bag.words[i]) - len(word)), size[i]))] for word in words
    }


def replaced(prompt: Prompt, words: Mapping[str, str]) -> Prompt:
    """The prompt with words replaced in every turn, in whatever case they stand."""

    def change(text: str) -> str:
        return re.sub(WORD, lambda found: words.get(found[0].lower(), found[0]), text)

    return _changed(prompt, change)


def counted(prompts: Sequence[Prompt]) -> Counter[str]:
    """How often each word stands in the prompts."""
    return Counter(found.lower() for prompt in prompts for found in re.findall(WORD, text_of(prompt)))


def others(words: Sequence[str], prompts: Sequence[Prompt], bag: BagOfWords, *, seed: int) -> tuple[str, ...]:
    """Other words of the training prompts, drawn until they stand in the prompts as often as these do."""
    counts, left = counted(prompts), [word for word in bag.words if " " not in word and word not in set(words)]
    wanted, chosen = sum(counts[word] for word in words), list[str]()
    for i in np.random.default_rng(seed).permutation(len(left)):
        if sum(counts[word] for word in chosen) >= wanted:
            break
        chosen.append(left[i])
    return tuple(chosen)


def _changed(prompt: Prompt, change: Callable[[str], str]) -> Prompt:
    """Each part of the last turn is changed by itself, so that the instruction is where it was."""
    source = prompt.shown
    instruction = source if prompt.instruction is None else prompt.instruction
    start = source.find(instruction) if prompt.start is None else source.find(instruction, prompt.start)
    before, after = change(source[:start]), change(source[start + len(instruction) :])
    text = before + change(instruction) + after
    kept = {} if prompt.instruction is None else {"instruction": change(instruction), "start": len(before)}
    if not prompt.messages:
        return replace(prompt, text=text, **kept)
    earlier = tuple(Message(role=turn["role"], content=change(turn["content"])) for turn in prompt.messages[:-1])
    return replace(prompt, messages=(*earlier, Message(role=prompt.messages[-1]["role"], content=text)), **kept)
