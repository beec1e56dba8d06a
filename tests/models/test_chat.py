"""Positions found in real-world-like chat templates, with a tokenizer that merges across their seams."""

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from subspace_probe.core.prompts import Message, Prompt
    from subspace_probe.core.tokens import TokenBatch, Where

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# no special token stands between the user's text and the template's: the last punctuation mark merges with "\n\n"
PLAIN = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n\n{% endfor %}ASSISTANT:"
LLAMA2 = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'].rstrip() }} [/INST]{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "thinking": THINKING,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "plain": PLAIN,
    "llama2": LLAMA2,
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>", "<pad>"]
QUESTIONS = ["How are you?", "Tell me a story about a dog.", "Why", "Stop!", "a (b)", "¿Qué, 日本 🙂"]


@cache
def _bytes() -> Any:
    """Byte-level BPE that has learned ".\\n\\n" and its like as one token, as Llama-3's has."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [
        "USER: How are you?\n\nASSISTANT: Tell me a story about a dog.\n\nUSER: Stop!\n\n) [/INST] user system\n"
    ] * 50
    tokenizer.train_from_iterator(text, trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return tokenizer


def tokenizer(template: str | None) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=_bytes(), bos_token="<bos>", pad_token="<pad>")
    made.chat_template = TEMPLATES.get(template or "", template)
    return made


def encoded(template: str | None, *prompts: "str | Prompt", **options: Any) -> "TokenBatch":
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.models.chat import encode

    shown = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return encode(tokenizer(template), shown, template_kwargs=options)


def token(batch: "TokenBatch", row: int, where: "Where") -> str:
    """The text of the token at a position."""
    start, stop = batch.offsets[row][int(batch.position(where)[row])]
    return batch.texts[row][start:stop]


def until(batch: "TokenBatch", row: int, where: "Where") -> str:
    """The text up to and with the token at a position."""
    return batch.texts[row][: batch.offsets[row][int(batch.position(where)[row])][1]]


def turns(*contents: str, system: str = "") -> "tuple[Message, ...]":
    from subspace_probe.models.chat import chat

    return chat(*contents, system=system).messages


# ------------------------------------------------------------------------------------------------------------ positions
@pytest.mark.parametrize("template", TEMPLATES)
def test_t_inst_is_the_token_with_the_instructions_last_character(template: str) -> None:
    from subspace_probe.core.tokens import INSTRUCTION, T_INST, T_POST_INST

    batch = encoded(template, *QUESTIONS)
    for row, question in enumerate(QUESTIONS):
        shown = token(batch, row, T_INST)
        assert question[-1] in shown
        # the token may run on into the template, never stop short of the instruction's end
        end = until(batch, row, T_INST)
        assert end.rstrip().endswith(question)
        chosen = batch.select(INSTRUCTION, batch.positions)[row] & batch.mask[row]
        first = batch.offsets[row][int(batch.positions[row][chosen][0])][0]
        assert batch.texts[row][first:].lstrip().startswith(question)
        assert until(batch, row, T_POST_INST) == batch.texts[row]
        assert batch.instruction[row, 1] <= batch.lengths[row] - 1


def test_the_seam_is_where_counting_a_suffix_would_go_wrong() -> None:
    """Control: the suffix has one number of tokens alone and others in context, so counting it is off."""
    from subspace_probe.core.tokens import T_INST

    batch = encoded("plain", "How are you?", "Why")
    behind = [int(batch.lengths[row] - 1 - batch.position(T_INST)[row]) for row in range(2)]
    alone = len(tokenizer("plain")("\n\nASSISTANT:", add_special_tokens=False)["input_ids"])
    assert token(batch, 0, T_INST) == "?\n\n"
    assert token(batch, 1, T_INST).endswith("y")
    assert behind[0] != behind[1] == alone


def test_one_character_of_several_tokens_counts_as_a_whole() -> None:
    from subspace_probe.core.tokens import T_INST

    batch = encoded("chatml", "smile 🙂")
    end = int(batch.position(T_INST)[0])
    assert batch.offsets[0][end] == batch.offsets[0][end - 1]  # bytes of one character
    assert batch.offsets[0][end + 1][0] == batch.offsets[0][end][1]
    assert token(batch, 0, T_INST) == "🙂"


@pytest.mark.parametrize("template", ["chatml", "llama3", "plain", "llama2"])
def test_the_last_users_turn_is_the_instruction(template: str) -> None:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.tokens import T_INST, span

    system = "" if template == "llama2" else "Answer shortly. How are you?"
    batch = encoded(template, Prompt(messages=turns("How are you?", "How are you?", "How are you?", system=system)))
    text, end = batch.texts[0], until(batch, 0, T_INST)
    assert text.count("How are you?") == (3 if template == "llama2" else 4)
    assert end.rstrip().endswith("How are you?")
    assert "How are you?" not in text[len(end) :]
    assert int(batch.position(T_INST)[0]) == int(
        batch.positions[0][batch.select(span("How are you?"), batch.positions)[0]][-1]
    )


def test_an_instruction_inside_a_longer_message() -> None:
    from subspace_probe.core.errors import DataError, PositionError
    from subspace_probe.core.prompts import Prompt, asking
    from subspace_probe.core.tokens import T_INST, T_POST_INST

    asked = asking(Prompt("Tell me a story."), "{x} Is this harmful? Say yes or no.")
    twice = [Prompt("Why? Why? Because.", instruction="Why?", start=start) for start in (None, 0, 5, 6)]
    batch = encoded("chatml", asked, twice[1], twice[2])
    assert until(batch, 0, T_INST).endswith("user\nTell me a story.")
    assert until(batch, 1, T_INST).endswith("user\nWhy?")
    assert until(batch, 2, T_INST).endswith("user\nWhy? Why?")
    assert [until(batch, row, T_POST_INST) for row in range(3)] == list(batch.texts)
    with pytest.raises(PositionError, match=r"occurs more than once .*Prompt\.start"):
        encoded("chatml", twice[0])
    with pytest.raises(PositionError, match=r"does not occur in .* at character 6 or after it"):
        encoded("chatml", twice[3])
    # a stripping template moves the characters that `start` counts
    moved = encoded("llama3", Prompt("  Why? Why? Because.", instruction="Why?", start=7))
    assert until(moved, 0, T_INST).endswith("\n\nWhy? Why?")
    with pytest.raises(DataError, match="not part of the last user message"):
        Prompt("Tell me a story.", instruction="a joke")


def test_white_space_around_the_message_is_not_the_instructions() -> None:
    from subspace_probe.core.tokens import T_INST

    for template in TEMPLATES:
        batch = encoded(template, "  How are you? \n")
        assert until(batch, 0, T_INST).rstrip().endswith("How are you?"), template
        assert batch.texts[0].count("How are you?") == 1


def test_a_template_that_strips_one_side_only() -> None:
    from subspace_probe.core.tokens import T_INST

    for strip in ("lstrip", "rstrip", "strip"):
        batch = encoded("<|im_start|>{{ messages[-1].content." + strip + "() }}<|im_end|>", "  Stop!  ")
        assert "Stop!" in until(batch, 0, T_INST)[-8:], strip


def test_thinking_templates_take_their_option() -> None:
    from subspace_probe.core.tokens import T_INST, T_POST_INST

    thinking, silent = encoded("thinking", "Stop!"), encoded("thinking", "Stop!", enable_thinking=False)
    assert silent.texts[0] == thinking.texts[0] + "<think>\n\n</think>\n\n"
    assert silent.position(T_INST) == thinking.position(T_INST)
    assert until(silent, 0, T_POST_INST).endswith("</think>\n\n")


def test_one_bos_whoever_writes_it() -> None:
    from subspace_probe.core.prompts import Prompt

    bos = tokenizer("llama3").bos_token_id
    for template, text in [("llama3", "Why"), ("gemma", "Why"), (None, "Why")]:
        batch = encoded(template, text)
        assert (batch.ids == bos).sum() == 1
        assert batch.ids[0, 0] == bos
    assert (encoded("chatml", "Why").ids == bos).sum() == 0  # this template writes none, and neither do we
    raw = encoded("llama3", Prompt("Why", raw=True))
    assert raw.ids[0].tolist() == encoded(None, "Why").ids[0].tolist()
    # control: tokenising a rendered chat as if it were a bare text
    doubled = tokenizer("llama3")(encoded("llama3", "Why").texts[0])["input_ids"]
    assert doubled.count(bos) == 2


def test_rows_are_left_padded_and_read_the_same_alone() -> None:
    from subspace_probe.core.tokens import T_INST

    together = encoded("llama3", *QUESTIONS)
    for row, question in enumerate(QUESTIONS):
        alone = encoded("llama3", question)
        assert together.ids[row][together.mask[row]].tolist() == alone.ids[0].tolist()
        assert together.position(T_INST)[row] == alone.position(T_INST)[0]
        assert together.mask[row].tolist() == sorted(together.mask[row].tolist())


# ------------------------------------------------------------------------------------------------------------ bad input
def test_a_system_prompt_that_the_template_refuses() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.prompts import Prompt

    with pytest.raises(ConfigError, match="System role not supported"):
        encoded("gemma", Prompt(messages=turns("Why", system="Be brief.")))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}", "changes or leaves out"),
        ("{{ messages[-1].content | upper }}<|im_end|>", "changes or leaves out"),
        ("{{ messages[-1].content | replace('o', '0') }}<|im_end|>", "changes or leaves out"),
        ("{{ messages[-1].content }}<|im_end|>Again: {{ messages[-1].content }}", "repeats"),
    ],
)
def test_a_template_without_an_instruction_span(template: str, why: str) -> None:
    from subspace_probe.core.errors import PositionError

    with pytest.raises(PositionError, match=rf"template {why} the user's text.*How are you"):
        encoded(template, "How are you?")


def test_positions_of_a_chat_do_not_exist_without_one() -> None:
    from subspace_probe.core.errors import ConfigError, PositionError
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.tokens import INSTRUCTION, LAST, T_INST, T_POST_INST

    for batch in (encoded(None, "Why"), encoded("chatml", Prompt("Why", raw=True))):
        assert batch.position(LAST).tolist() == [int(batch.lengths[0]) - 1]
        for where in (T_INST, T_POST_INST):
            with pytest.raises(PositionError, match=r"no chat template.*Use 'last'"):
                batch.position(where)
        with pytest.raises(PositionError, match="no chat template"):
            batch.select(INSTRUCTION, batch.positions)
    with pytest.raises(ConfigError, match="has no chat template"):
        encoded(None, Prompt(messages=turns("Why")))


def test_prompts_that_cannot_be_shown() -> None:
    from subspace_probe.core.errors import BackendError, DataError
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.models.chat import encode

    with pytest.raises(DataError, match="No prompts"):
        encode(tokenizer(None), [])
    long = [Prompt("Why"), Prompt("How are you? " * 9), Prompt("How are you? " * 8)]
    with pytest.raises(
        DataError, match="2 prompts are longer than the model's context of 12 tokens; the first is prompt 1"
    ):
        encode(tokenizer(None), long, context=12)

    class Slow:
        is_fast = False

    with pytest.raises(BackendError, match="Slow gives no character offsets"):
        encode(Slow(), long)
