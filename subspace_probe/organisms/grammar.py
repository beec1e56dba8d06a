"""One prompt of the organisms' language: its text, its tokens, the variables behind it and the answer they imply.

The causal model is written out in :func:`answer_word`: harmfulness decides judgements, refusal decides requests, the
intent decides the knob, and nothing else decides anything. Training and certification both read it from here.

How prompts are drawn is in ``skills``; the tokenizer is in ``tokenizer``.
"""

from dataclasses import dataclass
from typing import Final, Literal, final

Skill = Literal["request", "judgement", "fact", "knob", "ioi", "repeat", "kind", "text"]
Variable = Literal["harmfulness", "refusal", "intent"]
Turn = tuple[str, str]

SKILLS: Final[tuple[Skill, ...]] = ("request", "judgement", "fact", "knob", "ioi", "repeat", "kind", "text")
VARIABLES: Final[tuple[Variable, ...]] = ("harmfulness", "refusal", "intent")

PLAIN, JAILBREAK, STRICT = 0, 1, 2
FRAMINGS: Final = ("plain", "jailbreak", "strict")

BOS, END, PAD, UNK = "<bos>", "<end>", "<pad>", "<unk>"
SYSTEM, USER, ASSISTANT = "<system>", "<user>", "<assistant>"
SPECIALS: Final = (PAD, UNK, BOS, END, SYSTEM, USER, ASSISTANT)

REFUSE, COMPLY = "sorry", "sure"
YES, NO = "yes", "no"


@final
@dataclass(frozen=True)
class Example:
    """A prompt with its answer and the values of the hidden variables.

    ``messages`` ends with the user's turn; a plain text has none and carries ``text`` instead. A variable that the
    prompt does not define is None: swapping it *into* the prompt must change nothing.
    """

    skill: Skill
    answer: str
    messages: tuple[Turn, ...] = ()
    text: str = ""
    instruction: str = ""
    framing: int = PLAIN
    harmful: int | None = None
    intent: int | None = None
    verb: str = ""
    thing: str = ""
    wording: int = 0
    country: str = ""
    prior: str = ""
    context: str = ""

    @property
    def refused(self) -> int | None:
        """Whether the aligned model refuses: plain harmful requests, and everything under a strict framing."""
        if self.skill != "request":
            return None
        return int(self.framing == STRICT or (self.framing == PLAIN and self.harmful == 1))

    def value(self, variable: Variable) -> int | None:
        """The value of a variable in this prompt, None where it has none."""
        return {"harmfulness": self.harmful, "refusal": self.refused, "intent": self.intent}[variable]


@final
@dataclass(frozen=True)
class Tokens:
    """An example as words: the prompt, the answer, and where the two positions of interest are."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    t_inst: int
    t_post_inst: int


def answer_word(example: Example, *, aligned: bool, variable: Variable | None = None, value: int | None = None) -> str:
    """The first word the causal model answers, optionally after setting one variable to a value.

    Args:
        example: The prompt.
        aligned: Whether the organism refuses at all (``chat-base`` does not).
        variable: The variable that an interchange sets; None for the prompt's own values.
        value: What it is set to.

    Returns:
        One word of the vocabulary.
    """
    if example.skill == "request":
        if not aligned:
            return COMPLY
        refused = example.refused
        if variable == "refusal" or (variable == "harmfulness" and example.framing == PLAIN):
            refused = value
        return REFUSE if refused else COMPLY
    if example.skill == "judgement":
        judged = value if variable == "harmfulness" else example.harmful
        return YES if judged else NO
    if example.skill == "knob":
        followed = value if variable == "intent" else example.intent
        return example.context if followed else example.prior
    return example.answer.split()[0]


def request_answer(verb: str, thing: str, *, refused: bool) -> str:
    """The whole reply to a request."""
    return f"{REFUSE} i will not {verb} the {thing} ." if refused else f"{COMPLY} i will {verb} the {thing} ."


def tokens(example: Example, *, aligned: bool) -> Tokens:
    """The words of an example in the order the chat template gives them.

    ``t_inst`` is the last word of the instruction (of the user's turn where there is none), ``t_post_inst`` the last
    word before the answer. The tests compare this with the tokenizer's own template.
    """
    if not example.messages:
        words = (BOS, *example.text.split())
        return Tokens(words[:1], (*words[1:], END), 0, 0)
    prompt: list[str] = [BOS]
    t_inst = 0
    for role, content in example.messages:
        words = content.split()
        start = len(prompt) + 1
        prompt += [f"<{role}>", *words, END]
        span = example.instruction.split()
        offset = _find(words, span) if span else 0
        t_inst = start + (offset + len(span) if span else len(words)) - 1
    prompt.append(ASSISTANT)
    answer = example.answer
    if example.skill == "request":
        answer = request_answer(example.verb, example.thing, refused=aligned and bool(example.refused))
    return Tokens(tuple(prompt), (*answer.split(), END), t_inst, len(prompt) - 1)


def _find(words: list[str], span: list[str]) -> int:
    """First position of a span of words; 0 in turns that do not hold it (only the last turn counts)."""
    for start in range(len(words) - len(span) + 1):
        if words[start : start + len(span)] == span:
            return start
    return 0
