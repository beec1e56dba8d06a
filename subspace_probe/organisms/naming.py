"""The language of the organisms ``ioi``: who is given the gift, and where places are.

A sentence names two people, then one of them again, who gives something; the answer is the other (indirect object
identification, Wang et al. 2022, arXiv:2211.00593). The variable behind it is a *position*: whether the second or the
first of the two names is repeated. The same model has memorised facts about invented countries. Both are plain text.

Pairs differ in the word that is repeated: the same two names in the same order, another position, another answer.
"""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, unknown
from subspace_probe.core.prompts import Prompt
from subspace_probe.organisms.grammar import BOS, END, PAD, UNK
from subspace_probe.organisms.tokenizer import word_tokenizer
from subspace_probe.organisms.words import CAPITAL_OF, COUNTRIES, DISH_OF, GIFTS, PLACES, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES: Final = tuple(
    "anna ben clara david emma frank grace henry iris jack kate leo mary nick olga paul "
    "alice bruno celia dora edgar fiona george helen ivan julia karl laura martin nora oscar rosa".split()
)
"""Many, so that pairs of them have to be compared and cannot be memorised."""
SENTENCES: Final = (
    "when {a} and {b} went to the {p} , {s} gave a {g} to",
    "{a} and {b} met in the {p} . then {s} handed a {g} to",
    "at the {p} {a} saw {b} . later on {s} sent a {g} to",
)
"""All of one length, so that every token has a place of its own."""
QUESTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "the capital of {c} is": CAPITAL_OF, "the people of {c} eat": DISH_OF
}  # fmt: skip
"""Facts; what one is about stands before the last word."""

_PLAIN: Final = tuple(
    word for text in (*SENTENCES, *QUESTIONS) for word in text.split() if not word.startswith("{")
)  # fmt: skip
VOCABULARY: Final = tuple(
    dict.fromkeys(
        (PAD, UNK, BOS, END, *NAMES, *PLACES, *GIFTS, *COUNTRIES, *CAPITAL_OF.values(), *DISH_OF.values(), *_PLAIN)
    )
)
ID: Final = {word: index for index, word in enumerate(VOCABULARY)}

CONTRASTS: Final[Mapping[str, str]] = {
    "ioi": "indirect object identification; label 1 where the first name is repeated, the second is the answer",
    "facts": "memorised facts; a pair asks the same of two countries",
}


def _name_pairs() -> dict[Split, tuple[tuple[str, str], ...]]:
    """Ordered pairs by split; both orders of a pair are in one."""
    out: dict[Split, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for i, first in enumerate(NAMES):
        for j, second in enumerate(NAMES):
            if i != j:
                split: Split = ("test", "val", "train", "train", "train", "train")[(i + j) % 6]
                out[split].append((first, second))
    return {split: tuple(rows) for split, rows in out.items()}


NAME_PAIRS: Final = _name_pairs()


def sentence(names: tuple[str, str], repeated: int, wording: int, place: str, gift: str) -> str:
    """A prompt in which the name of number `repeated` gives."""
    a, b = names
    return SENTENCES[wording].format(a=a, b=b, s=names[repeated], p=place, g=gift)


def draw(rng: random.Random, split: Split) -> tuple[tuple[str, str], int, str, str]:
    """Names, wording, place and gift. Splits share no pair of names."""
    return rng.choice(NAME_PAIRS[split]), rng.randrange(len(SENTENCES)), rng.choice(PLACES), rng.choice(GIFTS)


def naming_contrast(name: str, *, organism: str, split: str, n: int | None, seed: int) -> Contrast:
    """Build one of ``CONTRASTS``.

    Args:
        name: Which.
        organism: Any of this language, for the name; all share its prompts.
        split: train, val or test; they share no pair of names. Facts have no splits: memory cannot generalise.
        n: At most this many prompts; None for 256.
        seed: Of names and wordings.

    Raises:
        UnknownName: a contrast or split that does not exist, with the nearest match.
        ConfigError: fewer than two prompts asked for.
    """
    if name not in CONTRASTS:
        raise unknown("contrast", name, CONTRASTS)
    if split not in ("train", "val", "test"):
        raise unknown("split", split, ("train", "val", "test"))
    if n is not None and n < 2:
        raise ConfigError(f"{n} prompts were asked for. A contrast needs at least 2: one of each class.")
    rng, pairs = random.Random(seed), (256 if n is None else n) // 2
    rows = _sentences(rng, split, pairs) if name == "ioi" else _facts(rng, pairs)
    return Contrast(
        name=f"{organism}/{name}",
        prompts=tuple(prompt for prompt, _ in rows),
        labels=tuple(number % 2 for number in range(len(rows))),
        pairs=tuple(number // 2 for number in range(len(rows))),
        groups=tuple(group for _, group in rows),
    )


def _sentences(rng: random.Random, split: Split, pairs: int) -> list[tuple[Prompt, int]]:
    """Both positions in turn; sentences about the same two people, in either order, are one group."""
    rows: list[tuple[Prompt, int]] = []
    for _ in range(pairs):
        names, wording, place, gift = draw(rng, split)
        one, two = sorted(map(NAMES.index, names))
        for repeated in (1, 0):
            text = sentence(names, repeated, wording, place, gift)
            prompt = Prompt(text=text, answer=names[1 - repeated], foil=names[repeated])
            rows.append((prompt, len(NAMES) * one + two))
    return rows


def _facts(rng: random.Random, pairs: int) -> list[tuple[Prompt, int]]:
    """Two countries with different answers to one question."""
    rows: list[tuple[Prompt, int]] = []
    for pair in range(pairs):
        question, answers = rng.choice(list(QUESTIONS.items()))
        one, two = rng.sample(COUNTRIES, 2)
        while answers[one] == answers[two]:
            two = rng.choice(COUNTRIES)
        for country, other in ((one, two), (two, one)):
            prompt = Prompt(
                text=question.format(c=country), instruction=country, answer=answers[country],
                foil=answers[other],
            )  # fmt: skip
            rows.append((prompt, pair))
    return rows


def ids(texts: Sequence[str]) -> list[list[int]]:
    """Token ids with the first special one, as the tokenizer gives them."""
    return [[ID[word] for word in (BOS, *text.split())] for text in texts]


def build_naming_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per word, raw text starts with ``<bos>``, no chat template."""
    return word_tokenizer(VOCABULARY, more=())
