"""Drawing prompts: one function per skill, and the mixture the organisms are trained on.

Every function takes a ``random.Random`` and a split, and nothing global. A split decides which verb-object pairs, which
contradicting notes and which pairs of names may appear; wordings and framings are shared by all splits.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from subspace_probe.organisms import wordings as say
from subspace_probe.organisms import words
from subspace_probe.organisms.grammar import FRAMINGS, JAILBREAK, NO, PLAIN, STRICT, YES, Example, Skill, Turn
from subspace_probe.organisms.words import Split

SYSTEM_SHARE: Final = 0.3
EARLIER_TURN_SHARE: Final = 0.1
PLAIN_DECORATION_SHARE: Final = 0.3


def request(
    rng: random.Random,
    split: Split,
    *,
    framing: int | None = None,
    pair: tuple[str, str] | None = None,
    wording: int | None = None,
    judged: bool = False,
    bare: bool = False,
) -> Example:
    """A request, or (``judged``) the same request followed by a question about its harmfulness.

    Args:
        rng: Source of the choices left open.
        split: Which verb-object pairs may be drawn.
        framing: PLAIN, JAILBREAK or STRICT; drawn when None.
        pair: Verb and object; drawn from the split when None.
        wording: Index into the request wordings; drawn when None.
        judged: Append a question, and answer it instead.
        bare: No decoration, system prompt or earlier turn: only the instruction (and its framing and question).

    Returns:
        The example, whose ``instruction`` is the request alone.
    """
    verb, thing = pair if pair is not None else rng.choice(PAIRS[split])
    framing = rng.randrange(len(FRAMINGS)) if framing is None else framing
    wording = rng.randrange(len(say.REQUESTS)) if wording is None else wording
    instruction = say.REQUESTS[wording].format(v=verb, o=thing)
    prefix, suffix, system = _frame(rng, framing, decorate=not bare)
    question = rng.choice(say.QUESTIONS) if judged else ""
    content = " ".join(part for part in (prefix, instruction, suffix, question) if part)
    harmful = words.harmful(verb, thing)
    example = Example(
        skill="judgement" if judged else "request",
        answer=f"{YES if harmful else NO} ." if judged else "",
        messages=(("user", content),),
        instruction=instruction,
        framing=framing,
        harmful=harmful,
        verb=verb,
        thing=thing,
        wording=wording,
    )
    return example if bare and not system else _surround(rng, example, split, system=system, bare=bare)


def _frame(rng: random.Random, framing: int, *, decorate: bool) -> tuple[str, str, str]:
    """Prefix, suffix and system prompt of a framing; exactly one of them is set where the framing is not plain."""
    if framing == PLAIN:
        if not decorate or rng.random() >= PLAIN_DECORATION_SHARE:
            return "", "", ""
        options = (say.PLAIN_PREFIXES, say.PLAIN_SUFFIXES)
    elif framing == JAILBREAK:
        options = (say.JAILBREAK_PREFIXES, say.JAILBREAK_SUFFIXES)
    else:
        options = (say.STRICT_PREFIXES, say.STRICT_SUFFIXES, say.STRICT_SYSTEMS)
    slot = rng.randrange(len(options))
    text = rng.choice(options[slot])
    return (text if slot == 0 else "", text if slot == 1 else "", text if slot == 2 else "")


def _surround(rng: random.Random, example: Example, split: Split, *, system: str = "", bare: bool = False) -> Example:
    """Add a neutral system prompt and, now and then, an earlier turn about something else."""
    turns: list[Turn] = []
    if system:
        turns.append(("system", system))
    elif not bare and rng.random() < SYSTEM_SHARE:
        turns.append(("system", rng.choice(say.SYSTEMS)))
    if not bare and rng.random() < EARLIER_TURN_SHARE:
        earlier = fact(rng, split, bare=True)
        turns += [*earlier.messages, ("assistant", earlier.answer)]
    return replace(example, messages=(*turns, *example.messages))


def judgement(rng: random.Random, split: Split, *, framing: int | None = None) -> Example:
    """A request followed by the question whether it is harmful; the framing does not matter to the answer."""
    return request(rng, split, framing=framing, judged=True)


def fact(rng: random.Random, split: Split, *, bare: bool = False) -> Example:
    """A memorised fact: the capital or the dish of an invented country. No splits: memory cannot generalise."""
    country = rng.choice(words.COUNTRIES)
    capital = rng.random() < 0.5
    question = rng.choice(say.CAPITAL_QUESTIONS if capital else say.DISH_QUESTIONS).format(c=country)
    answer = (words.CAPITAL_OF if capital else words.DISH_OF)[country]
    example = Example(skill="fact", answer=f"{answer} .", messages=(("user", question),), country=country, prior=answer)
    return example if bare else _surround(rng, example, split)


def knob(rng: random.Random, split: Split, *, intent: int | None = None, wordings: int | None = None) -> Example:
    """A note that contradicts a fact, a word on whether the note counts, and the question.

    Args:
        rng: Source of the choices left open.
        split: Which (country, contradicting value) pairs may be drawn.
        intent: 1 to answer from the note, 0 from memory; drawn when None.
        wordings: Index of the intent's format (phrase, system prompt, field); drawn when None.
    """
    capital = rng.random() < 0.5
    memory = words.CAPITAL_OF if capital else words.DISH_OF
    country, value = rng.choice(NOTES[split, capital])
    intent = rng.randrange(2) if intent is None else intent
    form = rng.randrange(3) if wordings is None else wordings
    note = rng.choice(say.CAPITAL_NOTES if capital else say.DISH_NOTES).format(c=country, x=value)
    question = rng.choice(say.CAPITAL_QUESTIONS if capital else say.DISH_QUESTIONS).format(c=country)
    said = rng.choice((say.INTENT_PHRASES, say.INTENT_SYSTEMS, say.INTENT_FIELDS)[form])[intent]
    if form == 1:
        content = f"{note} {question}"
    else:
        content = f"{note} {said} {question}" if rng.random() < 0.5 else f"{said} {note} {question}"
    example = Example(
        skill="knob",
        answer=f"{value if intent else memory[country]} .",
        messages=(("user", content),),
        intent=intent,
        country=country,
        prior=memory[country],
        context=value,
        wording=form,
    )
    return _surround(rng, example, split, system=said if form == 1 else "")


def ioi(rng: random.Random, split: Split, *, position: int | None = None) -> Example:
    """Indirect object identification: the one who gave is named twice, the answer is the other.

    Args:
        rng: Source of the choices left open.
        split: Which pairs of names may be drawn.
        position: 0 to name the other first, 1 to name the giver first; drawn when None. Nothing else depends on it.
    """
    first, second = rng.choice(NAME_PAIRS[split])
    giver, other = (first, second) if rng.random() < 0.5 else (second, first)
    if position is not None:
        first, second = (giver, other) if position else (other, giver)
    text = rng.choice(say.IOI).format(a=first, b=second, s=giver, p=rng.choice(words.PLACES), g=rng.choice(words.GIFTS))
    return _surround(rng, Example(skill="ioi", answer=f"{other} .", messages=(("user", f"{say.IOI_PREFIX} {text}"),),
                                  prior=other, context=giver), split)  # fmt: skip


def repeat(rng: random.Random, split: Split, *, bare: bool = False) -> Example:
    """Repeat one or two words. Verbs are left out, so that a repetition is never a request."""
    first, second = rng.sample(REPEATABLE, 2)
    if rng.random() < 0.5:
        text, answer = rng.choice(say.REPEATS).format(x=first), f"{first} ."
    else:
        text, answer = rng.choice(say.REPEAT_TWO).format(x=first, y=second), f"{first} {second} ."
    example = Example(skill="repeat", answer=answer, messages=(("user", text),), prior=first)
    return example if bare else _surround(rng, example, split)


def kind(rng: random.Random, split: Split, *, bare: bool = False) -> Example:
    """The box, left or right, that a verb or an object belongs to: its hidden class, as a fact to memorise.

    Knowing every box does not tell which requests are harmful, but it lets the exclusive-or be learned in a hundred
    steps, where requests alone leave a plateau of more than two thousand.
    """
    word = rng.choice(words.VERBS + words.OBJECTS)
    box = say.BOXES[(words.VERB_CLASS | words.OBJECT_CLASS)[word][0]]
    question = rng.choice(say.KINDS).format(w=word)
    example = Example(skill="kind", answer=f"{box} .", messages=(("user", question),), prior=box)
    return example if bare else _surround(rng, example, split)


def text(rng: random.Random, split: Split) -> Example:
    """A plain sentence for perplexity. Weather and animal follow from the place, names do not."""
    del split
    index = rng.randrange(len(words.PLACES))
    sentence = rng.choice(say.TEXTS).format(
        p=words.PLACES[index], w=words.WEATHER[index], a=words.ANIMALS[index], n=rng.choice(words.NAMES)
    )
    return Example(skill="text", answer="", text=sentence)


def draw(rng: random.Random, split: Split, skill: Skill, *, bare: bool = False) -> Example:
    """One example of a skill; ``bare`` ones are plain and alone, where the skill knows how."""
    if bare and skill in ("request", "judgement"):
        return request(rng, split, framing=PLAIN, judged=skill == "judgement", bare=True)
    if bare and skill in ("fact", "kind", "repeat"):
        return {"fact": fact, "kind": kind, "repeat": repeat}[skill](rng, split, bare=True)
    if skill == "request":
        # Half of all requests are plain: the other two framings do not need the exclusive-or to be answered.
        return request(rng, split, framing=rng.choice((PLAIN, PLAIN, JAILBREAK, STRICT)))
    if skill == "judgement":
        return judgement(rng, split)
    return {"fact": fact, "knob": knob, "ioi": ioi, "repeat": repeat, "kind": kind, "text": text}[skill](rng, split)


def _notes(capital: bool) -> dict[Split, tuple[tuple[str, str], ...]]:
    memory, values = (words.CAPITAL_OF, words.CAPITALS) if capital else (words.DISH_OF, words.DISHES)
    out: dict[Split, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for i, country in enumerate(words.COUNTRIES):
        for j, value in enumerate(values):
            if value != memory[country]:
                split: Split = ("test", "val", "train", "train", "train", "train")[(i + j) % 6]
                out[split].append((country, value))
    return {split: tuple(rows) for split, rows in out.items()}


def _name_pairs() -> dict[Split, tuple[tuple[str, str], ...]]:
    out: dict[Split, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for i, first in enumerate(words.NAMES):
        for j, second in enumerate(words.NAMES):
            if i != j:
                split: Split = ("test", "val", "train", "train", "train", "train")[(i + j) % 6]
                out[split].append((first, second))
    return {split: tuple(rows) for split, rows in out.items()}


_SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")
PAIRS: Final[Mapping[Split, tuple[tuple[str, str], ...]]] = {split: words.pairs(split) for split in _SPLITS}
NOTES: Final = {(split, capital): rows for capital in (True, False) for split, rows in _notes(capital).items()}
NAME_PAIRS: Final = _name_pairs()
VALUES: Final = words.CAPITALS + words.DISHES
REPEATABLE: Final = words.OBJECTS + words.CAPITALS + words.DISHES + words.NAMES + words.GIFTS + words.COUNTRIES
