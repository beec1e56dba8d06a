"""What a guard is given: texts, prompts, chats, a contrast, or activations that were captured already."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

import numpy as np
from numpy.typing import NDArray

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast, components
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.prompts import Message, Prompt

Groups = Sequence[int] | Sequence[str] | NDArray[np.generic]
"""Near-duplicates and common sources, by number or by name: one each a prompt."""
Item = str | Prompt | Sequence[Message]
Shown = str | Prompt | Contrast | Activations | Sequence[Item]
"""What can be judged: one item or several. A chat is a list of messages, the last one the user's."""


@final
@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts with what is known of them.

    Attributes:
        prompts: n prompts.
        y: 1 for the positive class, 0 for the negative, shape [n]; None where nobody said.
        groups: near-duplicates and common sources carry the same number, shape [n].
        nuisance: one number a prompt, shape [n]; None where there is none.
        acts: their activations, where those were given.
    """

    prompts: tuple[Prompt, ...]
    y: NDArray[np.int64] | None
    groups: NDArray[np.int64]
    nuisance: NDArray[np.float64] | None = None
    acts: Activations | None = None

    @property
    def grouped(self) -> bool:
        """Whether two prompts share a group."""
        return len(np.unique(self.groups)) < len(self.groups)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The labels.

        Raises:
            DataError: there are none, or those of one class only.
        """
        if self.y is None:
            raise DataError("Prompts came without labels. Give y, one 0 or 1 a prompt, or a contrast.")
        if len(set(self.y.tolist())) < 2:
            raise DataError(f"All {len(self.y)} prompts have the label {self.y[0]}. Give prompts of both classes.")
        return self.y

    @property
    def marked(self) -> int:
        """How many prompts say that only a part of their message is the instruction."""
        return sum(prompt.instruction not in (None, prompt.shown) for prompt in self.prompts)

    def keys(self) -> tuple[str, ...]:
        """A hash of each prompt's text, case and white space aside: tells prompts that were used from fresh ones."""
        return tuple(_key(prompt) for prompt in self.prompts)


def examples_of(
    X: Shown,
    y: Sequence[int] | NDArray[np.integer] | None = None,
    *,
    groups: Groups | None = None,
    nuisance: str | Sequence[float] | NDArray[np.floating] | None = None,
) -> Examples:
    """What users give, in one form.

    Args:
        X: prompts; a contrast or activations bring labels and groups of their own.
        y: one 0 or 1 a prompt.
        groups: one number a prompt.
        nuisance: a factor's name, or one number a prompt.

    Raises:
        DataError: labels or groups of another length, labels that are not 0 or 1, prompts that are none.
        UnknownName: no such factor.
    """
    acts = X if isinstance(X, Activations) else None
    contrast = X if isinstance(X, Contrast) else X.contrast if isinstance(X, Activations) else None
    if contrast is not None:
        prompts = contrast.prompts
        y = contrast.labels if y is None else y
        groups = components(contrast.pairs, contrast.groups) if groups is None else groups
        if isinstance(nuisance, str):
            nuisance = contrast.relabel(nuisance).labels
    else:
        prompts = tuple(prompt_of(item) for item in _listed(cast("str | Prompt | Sequence[Item]", X)))
    if isinstance(nuisance, str):
        raise ConfigError(f"nuisance={nuisance!r} names a factor, but the prompts came as a list. Give its numbers.")
    n = len(prompts)
    given = {"y": y, "groups": groups, "nuisance": nuisance}
    wrong = [f"{name} has {len(column)}" for name, column in given.items() if column is not None and len(column) != n]
    if wrong:
        raise DataError(f"{n} prompts were given, but {', '.join(wrong)} entries.")
    labels = None if y is None else np.asarray(y)
    if labels is not None and not set(labels.tolist()) <= {0, 1}:
        other = sorted(set(labels.tolist()) - {0, 1}, key=str)
        raise DataError(f"Labels {other[:5]} were given. Labels are 1 for what the guard looks for and 0 for the rest.")
    return Examples(
        prompts,
        None if labels is None else labels.astype(np.int64),
        np.arange(n) if groups is None else _numbered(groups),
        None if nuisance is None else np.asarray(nuisance, dtype=np.float64),
        acts,
    )


def prompt_of(item: Item) -> Prompt:
    """One text or chat as a prompt.

    Raises:
        DataError: an empty one, or something else.
    """
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return Prompt(text=item)
    if isinstance(item, Sequence) and item and all(_is_message(turn) for turn in item):
        return Prompt(messages=tuple(item))
    raise DataError(
        f"{str(item)[:80]!r} was given to be judged. Give a text, a Prompt, or a chat: a list of messages, each with "
        "'role' and 'content', both texts."
    )


def _numbered(groups: Groups) -> NDArray[np.int64]:
    """Groups, whatever they are called, by number."""
    names: dict[object, int] = {}
    return np.array([names.setdefault(name, len(names)) for name in np.asarray(groups).tolist()], dtype=np.int64)


def _listed(shown: str | Prompt | Sequence[Item]) -> Sequence[Item]:
    if isinstance(shown, str | Prompt):
        return [shown]
    if not isinstance(shown, Iterable):
        raise DataError(f"{shown!r} was given to be judged. Give a text, a Prompt, a list of them, or a contrast.")
    return list(shown)  # whatever can be gone through once


def _is_message(turn: object) -> bool:
    if not isinstance(turn, Mapping):
        return False
    found = cast("Mapping[object, object]", turn)
    return isinstance(found.get("role"), str) and isinstance(found.get("content"), str)


def _key(prompt: Prompt) -> str:
    turns = [f"{turn['role']} {turn['content']}" for turn in prompt.messages] or [f"user {prompt.text}"]
    text = "\n".join(" ".join(turn.casefold().split()) for turn in turns)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
