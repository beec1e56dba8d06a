"""From prompts to tokens, and where the instruction ends.

Positions come from the character offsets of the full rendered prompt, never from counting the tokens of a suffix
tokenised alone, which differ in context. Left padded; mask and position ids are always ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from subspace_probe.core.errors import BackendError, ConfigError, DataError, PositionError
from subspace_probe.core.prompts import Message, Prompt
from subspace_probe.core.tokens import TokenBatch

_SENTINEL = "subspaceprobesentinel"


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer carries a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat(*turns: str, system: str = "") -> Prompt:
    """A prompt from alternating user and assistant turns, the last one the user's."""
    messages = [Message(role="system", content=system)] if system else []
    roles = ("user", "assistant")
    messages += [Message(role=roles[i % 2], content=turn) for i, turn in enumerate(turns)]
    return Prompt(messages=tuple(messages))


def encode(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    context: int | None = None,
) -> TokenBatch:
    """Render, tokenise and left-pad prompts, and find each instruction.

    Args:
        tokenizer: a fast Hugging Face tokenizer. It is only read.
        prompts: what to show.
        template_kwargs: options of the chat template, such as `enable_thinking=False`.
        context: longest prompt the model takes, in tokens.

    Raises:
        BackendError: a tokenizer without character offsets.
        ConfigError: messages for a model without a chat template.
        DataError: no prompts, or prompts longer than the context.
    """
    if not getattr(tokenizer, "is_fast", False):
        name = type(tokenizer).__name__
        raise BackendError(
            f"{name} gives no character offsets, which positions are found by. Load the fast tokenizer (use_fast=True)."
        )
    if not prompts:
        raise DataError("No prompts were given. Give at least one.")
    texts: list[str] = []
    spans: list[tuple[int, int] | None] = []
    frames: dict[str, str] = {}
    for prompt in prompts:
        text, characters = render(tokenizer, prompt, template_kwargs or {}, frames)
        texts.append(text)
        spans.append(characters)
    ids: list[list[int]] = [[] for _ in texts]
    offsets: list[tuple[tuple[int, int], ...]] = [() for _ in texts]
    for bare in (True, False):
        rows = [row for row, characters in enumerate(spans) if (characters is None) == bare]
        if rows:
            # a template writes its own BOS; a bare prompt gets what the tokenizer gives it
            shown = [texts[row] for row in rows]
            found = tokenizer(shown, add_special_tokens=bare, return_offsets_mapping=True, verbose=False)
            for row, tokens, places in zip(rows, found["input_ids"], found["offset_mapping"], strict=True):
                ids[row], offsets[row] = tokens, tuple((int(a), int(b)) for a, b in places)
    _check_lengths(ids, texts, context)
    instruction = [_token_span(o, s, t) for o, s, t in zip(offsets, spans, texts, strict=True)]
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TokenBatch(
        ids=torch.tensor([[pad] * (longest - len(row)) + row for row in ids]),
        mask=torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in ids]),
        instruction=torch.tensor(instruction),
        templated=torch.tensor([span is not None for span in spans]),
        texts=tuple(texts),
        offsets=tuple(offsets),
        index=torch.arange(len(texts)),
    )


def render(
    tokenizer: Any, prompt: Prompt, template_kwargs: Mapping[str, Any], frames: dict[str, str] | None = None
) -> tuple[str, tuple[int, int] | None]:
    """The text shown to the model, and the characters of the instruction in it; None for text shown as it is.

    Args:
        tokenizer: with or without a chat template.
        prompt: what to show.
        template_kwargs: options of the chat template.
        frames: what the template puts around an instruction, by the turns before it, filled in here: prompts rendered
            together share it, since rendering takes longer than a tiny model.

    Raises:
        ConfigError: messages for a model without a chat template.
        PositionError: the template changes the instruction's text, so that it cannot be found again.
    """
    if not has_template(tokenizer):
        if prompt.messages:
            raise ConfigError(
                "The prompt has chat messages, but this model has no chat template. "
                "Give 'prompt' texts instead, or set tokenizer.chat_template."
            )
        return prompt.text, None
    if prompt.raw:
        return prompt.text, None
    messages = list(prompt.messages) or [Message(role="user", content=prompt.text)]
    full = _apply(tokenizer, messages, template_kwargs)
    content = messages[-1]["content"]
    known, before = {} if frames is None else frames, repr(messages[:-1])
    if before not in known:
        known[before] = _apply(tokenizer, [*messages[:-1], Message(role="user", content=_SENTINEL)], template_kwargs)
    marked = known[before]
    start, times = marked.find(_SENTINEL), marked.count(_SENTINEL)
    # templates may strip white space around the content, on either side
    kept = next((text for text in _stripped(content) if full.startswith(text, start)), None)
    if times != 1 or kept is None:
        why = "repeats" if times > 1 else "changes or leaves out"
        raise PositionError(
            f"The instruction cannot be found in the rendered chat: this template {why} the user's text. "
            f"It was {content!r}, rendered as {full!r}. Use 'text' with raw=True and the positions last or span."
        )
    begin, length = _part(prompt, content)
    begin += start - (len(content) - len(content.lstrip()) if kept == kept.lstrip() else 0)
    return full, (begin, begin + length)


def _part(prompt: Prompt, content: str) -> tuple[int, int]:
    """Where the instruction lies in the last user message, without white space around it: first character, length."""
    part = (prompt.instruction or content).strip()
    if prompt.start is not None:
        begin = content.find(part, prompt.start)
        if begin < 0:
            raise PositionError(
                f"The instruction {part!r} does not occur in {content!r} at character {prompt.start} or after it. "
                "Give the character at which it begins as Prompt.start."
            )
    else:
        begin = content.find(part)
        if content.find(part, begin + 1) >= 0:
            raise PositionError(
                f"The instruction {part!r} occurs more than once in {content!r}, so its last token is ambiguous. "
                "Say where it begins (Prompt.start)."
            )
    return begin, len(part)


def _stripped(content: str) -> tuple[str, ...]:
    return content, content.rstrip(), content.lstrip(), content.strip()


def _apply(tokenizer: Any, messages: Sequence[Message], template_kwargs: Mapping[str, Any]) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **template_kwargs
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"The chat template cannot render these messages: {error}. They are: {messages}") from None
    except Exception as error:
        # jinja2's errors, by name so that jinja2 is no dependency of ours
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise ConfigError(f"The chat template cannot render these messages: {error}. They are: {messages}") from None
    return str(text)


def _token_span(offsets: Sequence[tuple[int, int]], span: tuple[int, int] | None, text: str) -> tuple[int, int]:
    """First and last token that hold a character of the span."""
    if span is None:
        return -1, -1
    inside = [i for i, (a, b) in enumerate(offsets) if a < span[1] and b > span[0] and b > a]
    if not inside:
        raise PositionError(f"No token holds the instruction {text[span[0] : span[1]]!r} of the prompt {text!r}.")
    return inside[0], inside[-1]


def _check_lengths(ids: Sequence[Sequence[int]], texts: Sequence[str], context: int | None) -> None:
    empty = [row for row, tokens in enumerate(ids) if not tokens]
    if empty:
        raise DataError(f"Prompt {empty[0]} has no tokens: {texts[empty[0]]!r}. Leave it out.")
    if context is None:
        return
    long = [(row, len(tokens)) for row, tokens in enumerate(ids) if len(tokens) > context]
    if long:
        row, size = long[0]
        raise DataError(
            f"{len(long)} prompts are longer than the model's context of {context} tokens; the first is prompt {row} "
            f"with {size} tokens: {texts[row][:60]!r}... Shorten them or leave them out."
        )
