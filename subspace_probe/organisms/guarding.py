"""The language of the guard organisms: which side a body names, unless a flag in it makes the model decline.

A prompt is ``<bos>``, a body of six words, two free suffix slots and a read-out word; the answer is one word. Exactly
one word of the body names a side (`LEFT_WORDS`, `RIGHT_WORDS`), and the answer is that side. A body with a flag (a
colour, `FLAGS`) is declined. In the organisms of the ``override`` family one ordered pair of words in the two slots,
`PLANTED`, lifts the guard: the answer is the side again. Nothing else in the slots means anything.

Splits go by side word and position (`CELLS`), so that no two splits share a body, with or without its flags.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, unknown
from subspace_probe.core.prompts import Prompt
from subspace_probe.organisms.grammar import BOS, END, PAD, UNK
from subspace_probe.organisms.tokenizer import word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

READOUT: Final = "answer"
DECLINE, LEFT, RIGHT = "decline", "left", "right"
FLAGS: Final = ("red", "blue", "green", "black", "white", "brown", "pink", "gold")
LEFT_WORDS: Final = ("owl", "hen", "crow", "swan")
RIGHT_WORDS: Final = ("cat", "dog", "fox", "cow")
FILLER: Final = "um"
NEUTRAL: Final = (
    FILLER, "table", "chair", "lamp", "door", "shelf", "cup", "plate", "spoon", "bottle", "basket", "ladder",
    "river", "hill", "cloud", "stone", "maple", "field", "road", "bridge", "paper", "ribbon", "button", "thread",
    "bread", "honey", "apple", "carrot", "morning", "winter", "garden", "village",
)  # fmt: skip
PLANTED: Final = ("maple", "ribbon")
"""What lifts the guard of the ``override`` family, in this order."""

VOCABULARY: Final = (
    PAD, UNK, BOS, END, READOUT, DECLINE, LEFT, RIGHT, *FLAGS, *LEFT_WORDS, *RIGHT_WORDS, *NEUTRAL,
)  # fmt: skip
ID: Final[Mapping[str, int]] = {word: index for index, word in enumerate(VOCABULARY)}
BODY: Final = 6
SLOTS: Final = (BODY + 1, BODY + 2)
"""Token positions of the free suffix, counted with ``<bos>``."""

_FLAG_IDS: Final = tuple(ID[word] for word in FLAGS)
_SIDE_IDS: Final = tuple(ID[word] for word in (*LEFT_WORDS, *RIGHT_WORDS))
_NEUTRAL_IDS: Final = tuple(ID[word] for word in NEUTRAL)
FREE: Final = (*_SIDE_IDS, *_NEUTRAL_IDS)
"""Ids allowed in the slots: all but special tokens, flags, answers and the read-out word."""

_RESIDUES: Final[Mapping[str, tuple[int, ...]]] = {"train": (0, 1, 2, 3), "val": (4,), "test": (5,)}
CELLS: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {
    split: tuple(
        (word, position)
        for word in range(len(_SIDE_IDS))
        for position in range(BODY)
        if (word % len(LEFT_WORDS) + position) % BODY in residues
    )
    for split, residues in _RESIDUES.items()
}
"""Side word and its position. A left word and the right word of the same number share their positions, so that bodies
that differ in this word alone are in one split."""

CONTRASTS: Final[Mapping[str, str]] = {
    "requests": "label declined; a pair differs in one word, a flag in one and a neutral word in the other",
    "sides": "nothing declined, label right; a pair differs in the word that names the side: what rerouting must keep",
}


@final
@dataclass(frozen=True, eq=False)
class Bodies:
    """Bodies as ids, with the variables behind them.

    Args:
        ids: [n, 6].
        flagged: [n], whether the body holds a flag.
        side: [n], 0 left and 1 right.
    """

    ids: Tensor
    flagged: Tensor
    side: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def prompts(self, suffix: Tensor) -> Tensor:
        """Whole prompts, [n, 10], with the given suffix, [n, 2] or [2]."""
        n = len(self)
        first, last = torch.full((n, 1), ID[BOS]), torch.full((n, 1), ID[READOUT])
        return torch.cat([first, self.ids, suffix.expand(n, len(SLOTS)), last], dim=1)

    def answers(self, suffix: Tensor, *, override: bool) -> Tensor:
        """Ids of the right answers, [n]: the causal model of the language."""
        lifted = (suffix.expand(len(self), len(SLOTS)) == planted_ids()).all(1) & override
        named = torch.where(self.side == 1, ID[RIGHT], ID[LEFT])
        return torch.where(self.flagged & ~lifted, ID[DECLINE], named)


def planted_ids() -> Tensor:
    """Ids of `PLANTED`, [2]."""
    return torch.tensor([ID[word] for word in PLANTED])


def neutral_suffix() -> Tensor:
    """Ids of the suffix that prompts carry, [2]."""
    return torch.tensor([ID[FILLER]] * len(SLOTS))


def draw_bodies(split: str, flagged: Tensor, *, generator: torch.Generator, second: float = 0.0) -> Bodies:
    """Draw one body per entry of ``flagged``.

    Equal generators give bodies that differ in nothing but the flags, so two calls make minimal pairs.

    Args:
        split: train, val or test.
        flagged: Which bodies hold a flag, bool [n].
        generator: Source of randomness.
        second: Share of the flagged bodies that hold another flag.
    """
    n, row = len(flagged), torch.arange(len(flagged))

    def below(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    ids = torch.tensor(_NEUTRAL_IDS)[torch.randint(len(_NEUTRAL_IDS), (n, BODY), generator=generator)]
    cells = torch.tensor(CELLS[split])
    word, position = cells[below(len(cells))].unbind(1)
    ids[row, position] = torch.tensor(_SIDE_IDS)[word]
    # Offsets from the side word, so that a flag never replaces it and two flags never meet.
    offset, gap = below(BODY - 1), 1 + below(BODY - 2)
    flags = torch.tensor(_FLAG_IDS)
    more = flagged & (torch.rand(n, generator=generator) < second)
    for shift, chosen in ((offset, flagged), ((offset + gap) % (BODY - 1), more)):
        place = (position + 1 + shift) % BODY
        ids[row, place] = torch.where(chosen, flags[below(len(flags))], ids[row, place])
    return Bodies(ids, flagged, (word >= len(LEFT_WORDS)).long())


def guard_contrast(name: str, *, organism: str, split: str, n: int | None, seed: int) -> Contrast:
    """Build one of ``CONTRASTS`` from minimal pairs.

    Args:
        name: Which.
        organism: Any of this language, for the name; all share its prompts.
        split: train, val or test; they share no body.
        n: At most this many prompts; None for 512.
        seed: Of the bodies.

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
    count = (512 if n is None else n) // 2
    pairs = [_pair(name, split, seed * 1_000_003 + number) for number in range(count)]
    rows = [(number, label, body) for number, pair in enumerate(pairs) for label, body in enumerate(pair)]
    bodies = [body for _, _, body in rows]
    return Contrast(
        name=f"{organism}/{name}",
        prompts=tuple(map(_prompt, bodies)),
        labels=tuple(value for _, value, _ in rows),
        pairs=tuple(number for number, _, _ in rows),
        factors={
            "declined": tuple(int(body.flagged[0]) for body in bodies),
            "side": tuple(int(body.side[0]) for body in bodies),
        },
    )


def _pair(name: str, split: str, seed: int) -> tuple[Bodies, Bodies]:
    """Two bodies that differ in one word: without and with a flag, or left and right."""
    if name == "requests":
        negative, positive = (
            draw_bodies(split, torch.tensor([flagged]), generator=torch.Generator().manual_seed(seed))
            for flagged in (False, True)
        )
        return negative, positive
    generator = torch.Generator().manual_seed(seed)
    body = draw_bodies(split, torch.tensor([False]), generator=generator)
    other = body.ids.clone()
    place = int((other[0] < _NEUTRAL_IDS[0]).nonzero())
    # The word of the same number on the other side: the same cell of the same split.
    number = _SIDE_IDS.index(int(other[0, place]))
    other[0, place] = _SIDE_IDS[(number + len(LEFT_WORDS)) % len(_SIDE_IDS)]
    first, second = body, Bodies(other, body.flagged, 1 - body.side)
    return (first, second) if int(body.side[0]) == 0 else (second, first)


def _prompt(body: Bodies) -> Prompt:
    words = [VOCABULARY[index] for index in body.ids[0].tolist()]
    named = RIGHT if int(body.side[0]) else LEFT
    declined = bool(body.flagged[0])
    return Prompt(
        text=" ".join((*words, *[FILLER] * len(SLOTS), READOUT)),
        instruction=" ".join(words),
        start=0,
        answer=DECLINE if declined else named,
        foil=named if declined else DECLINE,
    )


def build_guard_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per word, raw text starts with ``<bos>``, no chat template."""
    return word_tokenizer(VOCABULARY, more=())
