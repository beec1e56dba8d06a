"""Token batches, and positions by meaning.

`Where` says which tokens of a prompt; it is data about prompts, whereas a `Site` is data about weights. All positions
are absolute: they count real tokens from the start of the row, so that a decoding step, which sees one token, is
addressed by the same numbers as a full pass.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from subspace_probe.core.errors import PositionError, unknown

Anchor = Literal[
    "all", "prompt", "generated", "t_inst", "t_post_inst", "last", "instruction", "at", "span", "after", "step"
]
_NUMBER = re.compile(r"-?[0-9]+")
_PARSE = re.compile(r"(?P<anchor>[a-z_]+)(?P<shift>[+-]\d+)?")


@final
@dataclass(frozen=True)
class Where:
    """Which tokens.

    Args:
        anchor: what is meant; see the constants below.
        shift: moved by so many tokens; only for anchors that are one token.
        text: for `span`, the text whose tokens are meant (its last occurrence in the prompt); for `after`, the one
            token behind which they begin.
    """

    anchor: Anchor
    shift: int = 0
    text: str = ""

    def __post_init__(self) -> None:
        if self.anchor not in get_args(Anchor):
            raise unknown("position", self.anchor, get_args(Anchor))
        if self.shift and not (self.single or self.anchor == "step"):
            raise PositionError(f"{self.anchor!r} is many tokens and cannot be shifted by {self.shift}.")
        if self.anchor == "step" and self.shift < 0:
            raise PositionError(f"step{self.shift} was asked for. The first generated token is step+0.")
        if self.anchor == "after" and not Where.parse(self.text).single:
            raise PositionError(f"{self.text!r} is not one token. Write after(T_INST), after(LAST) or after(at(3)).")
        if self.anchor == "span" and not self.text:
            raise PositionError("A span was asked for without its text. Write span('the king') or 'span:the king'.")

    @property
    def single(self) -> bool:
        """Whether it is exactly one token of every prompt."""
        return self.anchor in ("t_inst", "t_post_inst", "last", "at")

    def offset(self, by: int) -> "Where":
        """The token `by` places later (earlier if negative).

        Raises:
            PositionError: an absolute position that would begin to count from the other end.
        """
        if self.anchor == "at" and (self.shift < 0) != (self.shift + by < 0):
            raise PositionError(
                f"{self} moved by {by} would count from the other end of the prompt. Write at({by}) itself."
            )
        return replace(self, shift=self.shift + by)

    @classmethod
    def parse(cls, name: str) -> "Where":
        """Read `t_inst`, `last-1`, `at+3`, `all`, `after:t_inst`, `step+2`, `span:the king`, or a number as `at`."""
        for anchor in ("span", "after"):
            if name.startswith(f"{anchor}:"):
                return cls(anchor, text=name.removeprefix(f"{anchor}:"))
        if _NUMBER.fullmatch(name):
            return cls("at", int(name))
        match = _PARSE.fullmatch(name.lower().replace("-inst", "_inst").replace("t-post", "t_post"))
        anchor = match["anchor"] if match else name
        if match is None or anchor not in get_args(Anchor):
            raise unknown("position", name, get_args(Anchor))
        return cls(anchor, int(match["shift"] or 0))  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        if self.text:
            return f"{self.anchor}:{self.text}"
        return self.anchor + (f"{self.shift:+d}" if self.shift or self.anchor in ("at", "step") else "")


ALL = Where("all")
"""Every real token: prompt and generated."""
PROMPT = Where("prompt")
"""Every token of the prompt."""
GENERATED = Where("generated")
"""Tokens after the prompt; starts at the first generated token."""
T_INST = Where("t_inst")
"""The last token of the user's instruction (Zhao et al. 2025)."""
T_POST_INST = Where("t_post_inst")
"""The last token before the answer, the end of the chat template (Zhao et al. 2025)."""
LAST = Where("last")
"""The last prompt token, an absolute position that decoding does not move."""
INSTRUCTION = Where("instruction")
"""All tokens of the user's instruction."""


def at(position: int) -> Where:
    """An absolute position: from the first token if >= 0, from the last prompt token (-1) if negative."""
    return Where("at", position)


def span(text: str) -> Where:
    """The tokens of the last occurrence of `text` in the prompt."""
    return Where("span", text=text)


def after(where: Where) -> Where:
    """All tokens behind a one-token position, generated ones included."""
    return Where("after", text=str(where))


def step(index: int) -> Where:
    """One generated token, counted from 0; the pass that sees it produces the next one."""
    return Where("step", index)


@final
@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tokenised prompts, left padded.

    Attributes:
        ids: token ids, shape [batch, pos].
        mask: True at real tokens, shape [batch, pos].
        instruction: first and last absolute position of the instruction, shape [batch, 2]; -1 where there is none.
        templated: whether the row went through a chat template, shape [batch].
        texts: the text of each row, exactly as it was tokenised.
        offsets: per row, the character span of every real token.
        index: which prompt of the call each row is, shape [batch]; batches keep it, in whatever order they are run.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    instruction: Int[Tensor, "batch 2"]
    templated: Bool[Tensor, " batch"]
    texts: tuple[str, ...]
    offsets: tuple[tuple[tuple[int, int], ...], ...]
    index: Int[Tensor, " batch"]

    @property
    def size(self) -> int:
        """Number of prompts."""
        return self.ids.shape[0]

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Absolute position of every token; pads carry 0."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of real tokens of each prompt."""
        return self.mask.long().sum(-1)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch with its tensors on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "mask", "instruction", "templated", "index")}
        return replace(self, **moved)

    def rows(self, index: Sequence[int] | slice) -> "TokenBatch":
        """Some of the prompts, with padding that none of them needs cut off."""
        chosen = list(range(self.size))[index] if isinstance(index, slice) else list(index)
        mask = self.mask[chosen]
        start = self.ids.shape[1] - int(mask.sum(-1).max())
        return replace(
            self,
            ids=self.ids[chosen, start:],
            mask=mask[:, start:],
            instruction=self.instruction[chosen],
            templated=self.templated[chosen],
            texts=tuple(self.texts[row] for row in chosen),
            offsets=tuple(self.offsets[row] for row in chosen),
            index=self.index[chosen],
        )

    def repeat(self, times: int) -> "TokenBatch":
        """The batch stacked `times` times: all rows, then all rows again."""
        return replace(
            self,
            ids=self.ids.repeat(times, 1),
            mask=self.mask.repeat(times, 1),
            instruction=self.instruction.repeat(times, 1),
            templated=self.templated.repeat(times),
            texts=self.texts * times,
            offsets=self.offsets * times,
            index=self.index.repeat(times),
        )

    def position(self, where: Where) -> Int[Tensor, " batch"]:
        """The absolute position of a one-token `where` in every prompt.

        Raises:
            PositionError: a prompt does not have it.
        """
        last = self.lengths - 1
        if where.anchor == "t_inst":
            self._require(self.instruction[:, 1] >= 0, where, "it has no chat template, so no instruction span")
            found = self.instruction[:, 1] + where.shift
        elif where.anchor == "t_post_inst":
            self._require(self.templated, where, "it has no chat template, so no tokens after the instruction")
            found = last + where.shift
        elif where.anchor == "last":
            found = last + where.shift
        elif where.anchor == "at":
            found = torch.full_like(last, where.shift) if where.shift >= 0 else last + 1 + where.shift
        else:
            raise PositionError(f"{str(where)!r} is not one token. Use t_inst, t_post_inst, last or a number.")
        self._require((found >= 0) & (found <= last), where, "it is too short")
        return found

    def select(self, where: Where, positions: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Which of the tokens at the given absolute positions are meant. Pads are for the caller to exclude.

        Args:
            where: the tokens meant.
            positions: absolute positions, shape [batch, pos]; one column while decoding.
        """
        prompt_end = self.lengths[:, None]
        if where.anchor == "all":
            return torch.ones_like(positions, dtype=torch.bool)
        if where.anchor == "prompt":
            return positions < prompt_end
        if where.anchor == "generated":
            return positions >= prompt_end
        if where.anchor == "after":
            return positions > self.position(Where.parse(where.text))[:, None]
        if where.anchor == "step":
            return positions == prompt_end + where.shift
        if where.anchor == "instruction":
            self._require(self.instruction[:, 1] >= 0, where, "it has no chat template, so no instruction span")
            return (positions >= self.instruction[:, :1]) & (positions <= self.instruction[:, 1:])
        if where.anchor == "span":
            bounds = torch.tensor([self._find(row, where) for row in range(self.size)], device=positions.device)
            return (positions >= bounds[:, :1]) & (positions <= bounds[:, 1:])
        return positions == self.position(where)[:, None]

    def _find(self, row: int, where: Where) -> tuple[int, int]:
        start = self.texts[row].rfind(where.text)
        end = start + len(where.text)
        inside = [i for i, (a, b) in enumerate(self.offsets[row]) if a < end and b > start and b > a]
        if start < 0 or not inside:
            raise PositionError(f"The text {where.text!r} does not occur in prompt {row}: {self.texts[row]!r}.")
        return inside[0], inside[-1]

    def _require(self, good: Bool[Tensor, " batch"], where: Where, why: str) -> None:
        if not bool(good.all()):
            row = int((~good).nonzero()[0, 0])
            hint = " Use 'last', a number or 'span:...' instead." if "template" in why else ""
            raise PositionError(f"Prompt {row} has no position {str(where)!r}: {why}.{hint} It is: {self.texts[row]!r}")
