"""What a model is shown: an instruction or a whole chat, and what one expects of it."""

from dataclasses import dataclass, replace
from typing import TypedDict, final

from subspace_probe.core.errors import ConfigError, DataError


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@final
@dataclass(frozen=True)
class Prompt:
    """What the model is shown, and what one expects of it.

    Args:
        text: an instruction, put into one user turn where the model has a chat template, and shown as it is where
            it has none.
        messages: a whole chat instead: system prompt, several turns, the last one the user's.
        raw: show `text` as it is even to a chat model. For plain text and base-model prompts.
        instruction: the part of the last user message that *is* the instruction: `T_INST` is its last token.
            Give it where a question or a wrapper follows; default is the whole message.
        start: character of the last user message at which the instruction begins; needed only where its text occurs
            more than once.
        answer: the text that the positive behaviour would continue with; only its first token is scored.
        foil: the text it is scored against.
    """

    text: str = ""
    messages: tuple[Message, ...] = ()
    raw: bool = False
    instruction: str | None = None
    start: int | None = None
    answer: str | None = None
    foil: str | None = None

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.messages):
            given = "both text and messages" if self.text else "neither text nor messages"
            raise DataError(f"A prompt has {given}. Give exactly one of them, and not empty.")
        if self.messages and self.messages[-1]["role"] != "user":
            role = self.messages[-1]["role"]
            raise DataError(f"The last message of a prompt is from {role!r}. It must be from 'user'.")
        source = self.messages[-1]["content"] if self.messages else self.text
        if not source.strip():
            raise DataError("A prompt is empty or only white space.")
        try:
            source.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"A prompt holds half of a surrogate pair, which is no text: {source!r}. Read its file as UTF-8."
            ) from None
        if self.instruction is not None and (not self.instruction.strip() or self.instruction not in source):
            raise DataError(f"The instruction {self.instruction!r} is not part of the last user message {source!r}.")

    @property
    def shown(self) -> str:
        """The last user turn, for tables."""
        return self.messages[-1]["content"] if self.messages else self.text


def asking(prompt: Prompt, question: str) -> Prompt:
    """The prompt with a question about it in the same turn; its instruction stays what it was (reply inversion).

    Args:
        question: a template with `{x}` where the prompt's own text goes: "{x} Is this harmful?".

    Raises:
        ConfigError: a template without `{x}`.
    """
    if "{x}" not in question:
        raise ConfigError(
            f"The question {question!r} has no {{x}} for the prompt's text. Write it like '{{x}} Is this so?'."
        )
    source = prompt.shown
    asked, instruction = question.replace("{x}", source), prompt.instruction or source
    inside = prompt.start if prompt.start is not None else source.find(instruction)
    start = question.index("{x}") + inside
    if prompt.messages:
        messages = (*prompt.messages[:-1], Message(role="user", content=asked))
        return replace(prompt, messages=messages, instruction=instruction, start=start, answer=None, foil=None)
    return replace(prompt, text=asked, instruction=instruction, start=start, answer=None, foil=None)
