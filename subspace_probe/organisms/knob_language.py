"""The language of the knob organisms: a note against memory, and a word that says which of the two to answer from.

A prompt is ``<bos>``, a note (an animal and the place it names), the word ``ask``, the animal again, and the intent:
``otter lake ask otter context``. Every animal has one home that is known by heart (`HOMES`); the note always names
another place, except where it agrees on purpose. The answer is the note's place where the intent is *context*, and the
home where it is *prior*.

The intent comes in three formats of one word each (`FORMATS`), so that in the ``knob`` organisms it is the very last
token: an instruction (``context``, ``memory``), a weight (``1``, ``0``), and none (``answer``), after which either
answer is right. In the ``early`` organisms one more token, ``:``, follows the intent.

Splits go by animal and place (`CELLS`): no two of them share a note.
"""

import random
from collections import Counter
from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, unknown
from subspace_probe.core.prompts import Prompt
from subspace_probe.organisms.grammar import BOS, END, PAD, UNK
from subspace_probe.organisms.tokenizer import word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ASK, NEXT, SEPARATOR = "ask", "next", ":"
FORMATS: Final[Mapping[str, tuple[str, str]]] = {
    "instruction": ("memory", "context"), "weight": ("0", "1"), "none": ("answer", "answer"),
}  # fmt: skip
"""The last word of each format, for the prior (0) and for the context (1)."""
SUBJECTS: Final = (
    "otter", "badger", "heron", "falcon", "beaver", "lynx", "raven", "marten", "stork", "hare",
    "boar", "deer", "wolf", "bear", "moose", "ferret", "weasel", "puffin", "gull", "tern",
    "finch", "robin", "wren", "lark", "quail", "plover", "magpie", "kestrel", "osprey", "bittern",
    "newt", "toad", "viper", "gecko", "turtle", "salmon", "trout", "perch", "eel", "carp",
)  # fmt: skip
OBJECTS: Final = (
    "lake", "river", "brook", "pond", "marsh", "delta", "fjord", "bay", "reef", "island",
    "cave", "cliff", "canyon", "valley", "ridge", "summit", "glacier", "plateau", "meadow", "orchard",
    "forest", "grove", "thicket", "heath", "prairie", "desert", "dune", "oasis", "harbour", "village",
    "castle", "tower", "barn", "mill", "bridge", "quarry", "garden", "temple", "market", "station",
)  # fmt: skip
VOCABULARY: Final = (
    PAD, UNK, BOS, END, ASK, NEXT, SEPARATOR, "memory", "context", "0", "1", "answer", *SUBJECTS, *OBJECTS,
)  # fmt: skip
ID: Final[Mapping[str, int]] = {word: index for index, word in enumerate(VOCABULARY)}

INTENT: Final = 5
"""Token position of the intent, counted with ``<bos>``."""
_TRAIN, _VAL = 27, 4


def _shuffled(n: int, seed: int) -> list[int]:
    numbers = list(range(n))
    random.Random(seed).shuffle(numbers)
    return numbers


HOMES: Final = tuple(_shuffled(len(OBJECTS), 1))
"""Number of each animal's home among the places."""
NEXT_OF: Final = tuple(_shuffled(len(OBJECTS), 2))
"""Number of the place that follows each place, in a second skill that has nothing to do with notes."""


def _cells() -> Mapping[str, tuple[tuple[int, int], ...]]:
    found: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
    for subject in range(len(SUBJECTS)):
        others = [place for place in _shuffled(len(OBJECTS), 100 + subject) if place != HOMES[subject]]
        for number, place in enumerate(others):
            split = "train" if number < _TRAIN else "val" if number < _TRAIN + _VAL else "test"
            found[split].append((subject, place))
    return {split: tuple(cells) for split, cells in found.items()}


CELLS: Final[Mapping[str, tuple[tuple[int, int], ...]]] = _cells()
"""Animal and noted place of every split: 1,080 to train on, 160 to choose by, 320 to test on."""

CONTRASTS: Final[Mapping[str, str]] = {
    "instruction": "a note against memory, intent in words: label 1 where the note counts",
    "weight": "the same, intent as a weight of 1 or 0",
    "none": "the same without an intent: both prompts of a pair are equal, only the wanted answers differ",
    "others": "what the intent must not touch: homes without a note, notes that agree, and which place is next",
}


def knob_contrast(name: str, *, organism: str, split: str, n: int | None, seed: int) -> Contrast:
    """Build one of ``CONTRASTS``.

    Args:
        name: Which.
        organism: What follows the intent depends on it.
        split: train, val or test; they share no animal with the same note.
        n: At most this many prompts; None for all that the split has.
        seed: Of the order.

    Raises:
        UnknownName: a contrast or split that does not exist, with the nearest match.
        ConfigError: fewer than two prompts asked for.
    """
    if name not in CONTRASTS:
        raise unknown("contrast", name, CONTRASTS)
    if split not in CELLS:
        raise unknown("split", split, CELLS)
    if n is not None and n < 2:
        raise ConfigError(f"{n} prompts were asked for. A contrast needs at least 2: one of each class.")
    end = f" {SEPARATOR}" if organism.startswith("early") else ""
    if name == "others":
        return _others(n, seed=seed, label=f"{organism}/{name}", end=end)
    cells = list(CELLS[split])
    random.Random(seed).shuffle(cells)
    drawn = Counter[int]()  # all animals once, then all of them again, so that a few prompts are of many animals
    cells = [cell for _, cell in sorted(((_counted(drawn, cell[0]), cell) for cell in cells), key=itemgetter(0))]
    rows = [(pair, subject, place, intent) for pair, (subject, place) in enumerate(cells) for intent in (0, 1)]
    rows = rows[: None if n is None else 2 * (n // 2)]
    return Contrast(
        name=f"{organism}/{name}",
        prompts=tuple(_prompt(s, place, intent, FORMATS[name][intent] + end) for _, s, place, intent in rows),
        labels=tuple(intent for *_, intent in rows),
        pairs=tuple(pair for pair, *_ in rows),
        # what is wrong about one animal is wrong with every note about it
        groups=tuple(subject for _, subject, _, _ in rows),
        factors={"subject": tuple(row[1] for row in rows), "noted": tuple(row[2] for row in rows)},
    )


def _counted(drawn: Counter[int], subject: int) -> int:
    drawn[subject] += 1
    return drawn[subject]


def _prompt(subject: int, place: int, intent: int, end: str) -> Prompt:
    animal, noted, home = SUBJECTS[subject], OBJECTS[place], OBJECTS[HOMES[subject]]
    answer, foil = (noted, home) if intent else (home, noted)
    return Prompt(text=f"{animal} {noted} {ASK} {animal} {end}", answer=answer, foil=foil)


def _others(n: int | None, *, seed: int, label: str, end: str) -> Contrast:
    """Homes without a note, notes that agree, both without an intent; and the second skill. Labels say nothing."""
    word = FORMATS["none"][0] + end
    prompts: list[Prompt] = []
    for subject, animal in enumerate(SUBJECTS):
        home = OBJECTS[HOMES[subject]]
        prompts.append(Prompt(text=f"{ASK} {animal} {word}", answer=home))
        prompts.append(Prompt(text=f"{animal} {home} {ASK} {animal} {word}", answer=home))
    prompts += [Prompt(text=f"{NEXT} {OBJECTS[i]}", answer=OBJECTS[j]) for i, j in enumerate(NEXT_OF)]
    random.Random(seed).shuffle(prompts)
    prompts = prompts[:n]
    return Contrast(name=label, prompts=tuple(prompts), labels=tuple(i % 2 for i in range(len(prompts))))


def build_knob_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per word, raw text starts with ``<bos>``, no chat template."""
    return word_tokenizer(VOCABULARY, more=())
