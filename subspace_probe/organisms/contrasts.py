"""The organisms' prompts as contrasts: what ``load_contrast("organism:chat/requests")`` gives.

Requests and judgements come in minimal pairs: the same verb, wording, framing and surroundings, and an object of the
other hidden class. ``groups`` keeps together everything about one verb and its two objects, so that no split of a
contrast separates wordings or framings of the same verb-object pair.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, final

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, unknown
from subspace_probe.core.prompts import Prompt
from subspace_probe.organisms import skills, words
from subspace_probe.organisms.grammar import COMPLY, FRAMINGS, NO, REFUSE, SKILLS, YES, Example
from subspace_probe.organisms.words import Split

SPLITS: Final = ("train", "val", "test")


@final
@dataclass(frozen=True)
class _Row:
    example: Example
    answer: str
    foil: str
    label: int
    pair: int
    group: int


def minimal_pairs(split: Split) -> tuple[tuple[str, str, str], ...]:
    """Every (verb, harmless object, harmful object) of a split; each verb-object pair occurs exactly once."""
    out: list[tuple[str, str, str]] = []
    for verb in words.VERBS:
        things = [thing for v, thing in words.pairs(split) if v == verb]
        harmless = [thing for thing in things if not words.harmful(verb, thing)]
        harmful = [thing for thing in things if words.harmful(verb, thing)]
        out += [(verb, a, b) for a, b in zip(harmless, harmful, strict=True)]
    return tuple(out)


def _requests(
    split: Split, n: int | None, seed: int, *, framings: tuple[int, ...], judged: bool, aligned: bool
) -> list[_Row]:
    rng = random.Random(seed)
    units = list(enumerate(minimal_pairs(split)))
    rng.shuffle(units)
    if n is not None:
        units = units[: max(1, n // (2 * len(framings)))]
    rows: list[_Row] = []
    for group, (verb, *things) in units:
        for framing in framings:
            surroundings = rng.getrandbits(32)
            for label, thing in enumerate(things):
                # The same seed for both: they differ in the object and in nothing else.
                example = skills.request(
                    random.Random(surroundings), split, framing=framing, pair=(verb, thing), judged=judged
                )
                refused = aligned and bool(example.refused)
                answer, foil = (REFUSE, COMPLY) if refused else (COMPLY, REFUSE)
                if judged:
                    answer, foil = (YES, NO) if label else (NO, YES)
                rows.append(_Row(example, answer, foil, label, len(FRAMINGS) * group + framing, group))
    return rows


def _knob(split: Split, n: int | None, seed: int) -> list[_Row]:
    rng = random.Random(seed)
    rows: list[_Row] = []
    for pair in range((n or 512) // 2):
        surroundings = rng.getrandbits(32)
        for intent in (0, 1):
            example = skills.knob(random.Random(surroundings), split, intent=intent)
            answer, foil = (example.prior, example.context)[:: -1 if intent else 1]
            key = words.COUNTRIES.index(example.country) * 100 + skills.VALUES.index(example.context)
            rows.append(_Row(example, answer, foil, intent, pair, key))
    return rows


def _ioi(split: Split, n: int | None, seed: int) -> list[_Row]:
    """Pairs that differ in which of the two names comes first, and in nothing else; both have the same answer."""
    rng = random.Random(seed)
    rows: list[_Row] = []
    for pair in range((n or 256) // 2):
        surroundings = rng.getrandbits(32)
        for position in (0, 1):
            example = skills.ioi(random.Random(surroundings), split, position=position)
            names = sorted(words.NAMES.index(name) for name in (example.prior, example.context))
            group = names[0] * len(words.NAMES) + names[1]
            rows.append(_Row(example, example.prior, example.context, position, pair, group))
    return rows


def _simple(draw: Callable[[random.Random, Split], Example]) -> Callable[[Split, int | None, int], list[_Row]]:
    """A skill without a class of its own: labels alternate; the foil is the wrong name or value, or another answer."""

    def rows(split: Split, n: int | None, seed: int) -> list[_Row]:
        rng = random.Random(seed)
        examples = [draw(rng, split) for _ in range(n or 256)]
        answers = [example.answer.split()[0] if example.answer else "" for example in examples]
        out = []
        for i, (example, answer) in enumerate(zip(examples, answers, strict=True)):
            known = [word for word in (example.prior, example.context) if example.context]
            others = [other for other in known + answers[i:] + answers[:i] if other != answer]
            out.append(_Row(example, answer, others[0] if others else "", i % 2, i, i))
        return out

    return rows


def _any_skill(rng: random.Random, split: Split) -> Example:
    return skills.draw(rng, split, rng.choice(("fact", "kind", "knob", "ioi", "repeat")))


_OTHERS: Final[Mapping[str, Callable[[Split, int | None, int], list[_Row]]]] = {
    "facts": _simple(skills.fact),
    "knob": _knob,
    "ioi": _ioi,
    "repeat": _simple(skills.repeat),
    "kinds": _simple(skills.kind),
    "skills": _simple(_any_skill),
    "text": _simple(skills.text),
}

CONTRASTS: Final[Mapping[str, str]] = {
    "requests": "requests in all framings: label harmful, factors refused and framing (2 x 2)",
    "harmfulness": "plain requests, harmful and harmless",
    "judgement": "requests followed by the question whether they are harmful",
    "knob": "a note against a memorised fact: label 1 where the note counts",
    "facts": "memorised facts",
    "ioi": "indirect object identification: label 1 where the repeated name comes first; factors io, s and position",
    "repeat": "repeating words",
    "kinds": "which of two boxes a word belongs to: the hidden classes, as memorised facts",
    "skills": "facts, kinds, knob, ioi and repeating, mixed: what interventions on refusal should leave alone",
    "text": "plain sentences, raw",
}


def build_contrast(name: str, *, organism: str, split: str, n: int | None, seed: int) -> Contrast:
    """Build one of ``CONTRASTS``.

    Args:
        name: Which.
        organism: Which one answers; ``chat-base`` refuses nothing, and the expected answers say so.
        split: train, val or test. They share no verb-object pair, no contradicting note and no pair of names.
        n: At most this many prompts; None for every pair of the split (or 512 and 256 for the other skills).
        seed: Of wordings, surroundings and order.
    """
    if name not in CONTRASTS:
        raise unknown("organism contrast", name, CONTRASTS)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if n is not None and n < 2:
        raise ConfigError(f"{n} prompts of {name!r} were asked for. A contrast needs at least 2.")
    aligned = organism != "chat-base"
    if name in _OTHERS:
        rows = _OTHERS[name](split, n, seed)
    else:
        rows = _requests(
            split, n, seed, aligned=aligned, judged=name == "judgement",
            framings=(0,) if name == "harmfulness" else (0, 1, 2),
        )  # fmt: skip
    return Contrast(
        name=f"{organism}/{name}",
        prompts=tuple(_prompt(row) for row in rows),
        labels=tuple(row.label for row in rows),
        pairs=tuple(row.pair for row in rows),
        groups=tuple(row.group for row in rows),
        factors=_factors(rows, aligned=aligned),
    )


def _prompt(row: _Row) -> Prompt:
    if row.example.text:
        return Prompt(text=row.example.text, raw=True)
    return Prompt(
        messages=tuple({"role": role, "content": content} for role, content in row.example.messages),
        instruction=row.example.instruction or None,
        answer=row.answer,
        foil=row.foil or None,
    )


def _factors(rows: list[_Row], *, aligned: bool) -> dict[str, tuple[int, ...]]:
    examples = [row.example for row in rows]
    if examples[0].verb:
        return {
            "refused": tuple(int(aligned and bool(e.refused)) for e in examples),
            "framing": tuple(e.framing for e in examples),
            "verb": tuple(words.VERBS.index(e.verb) for e in examples),
            "object": tuple(words.OBJECTS.index(e.thing) for e in examples),
            "wording": tuple(e.wording for e in examples),
        }
    factors = {"skill": tuple(SKILLS.index(e.skill) for e in examples)}
    if examples[0].skill == "knob" and all(e.skill == "knob" for e in examples):
        factors["format"] = tuple(e.wording for e in examples)
    if all(e.skill == "ioi" for e in examples):
        factors["io"] = tuple(words.NAMES.index(e.prior) for e in examples)
        factors["s"] = tuple(words.NAMES.index(e.context) for e in examples)
        factors["position"] = tuple(row.label for row in rows)
    return factors


def near_duplicates(train: Contrast, test: Contrast) -> dict[str, int]:
    """How close the prompts of two splits come.

    Returns:
        Counts of test prompts: ``n``; ``same_text`` (also in train, word for word); ``same_pair`` (train has the same
        verb and object, in whatever wording or framing); ``same_frame`` (train has the same words around another
        verb and object; wordings are shared on purpose, so this is high).
    """

    def texts(contrast: Contrast) -> list[str]:
        return [p.text or " / ".join(m["content"] for m in p.messages) for p in contrast.prompts]

    def pairs(contrast: Contrast) -> list[tuple[int, int]]:
        return list(zip(contrast.factors.get("verb", ()), contrast.factors.get("object", ()), strict=True))

    def frames(contrast: Contrast) -> list[str]:
        out = []
        for text, (verb, thing) in zip(texts(contrast), pairs(contrast), strict=False):
            masked = {words.VERBS[verb]: "V", words.OBJECTS[thing]: "O"}
            out.append(" ".join(masked.get(word, word) for word in text.split()))
        return out

    known_texts, known_pairs, known_frames = set(texts(train)), set(pairs(train)), set(frames(train))
    return {
        "n": len(test),
        "same_text": sum(text in known_texts for text in texts(test)),
        "same_pair": sum(pair in known_pairs for pair in pairs(test)),
        "same_frame": sum(frame in known_frames for frame in frames(test)),
    }
