"""The organisms' tokenizer: one token per word, and a chat template."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from subspace_probe.organisms import wordings, words
from subspace_probe.organisms.grammar import ASSISTANT, BOS, COMPLY, END, NO, PAD, REFUSE, SPECIALS, UNK, YES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant') }}"
    "{% endif %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <end>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def vocabulary() -> tuple[str, ...]:
    """Every token, special ones first, in a fixed order."""
    found: dict[str, None] = dict.fromkeys(SPECIALS)
    found.update(dict.fromkeys((REFUSE, COMPLY, YES, NO, *"i will not the .".split())))
    for name in sorted(vars(words)):
        value = getattr(words, name)
        if name.isupper() and isinstance(value, tuple):
            found.update(dict.fromkeys(value))
    for name in sorted(vars(wordings)):
        if name.isupper():
            for sentence in _sentences(getattr(wordings, name)):
                found.update(dict.fromkeys(re.sub(r"\{\w\}", " ", sentence).split()))
    return tuple(found)


def _sentences(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, tuple):
        return [sentence for part in value for sentence in _sentences(part)]
    return []


def word_tokenizer(vocabulary: Sequence[str], *, more: Sequence[str]) -> "PreTrainedTokenizerFast":
    """A fast tokenizer (offsets work), one lower-case word a token, that starts raw text with ``<bos>``.

    Args:
        vocabulary: Every token, in the order of the ids.
        more: Special tokens beside those for padding, unknown words, beginning and end.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=list(more),
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        padding_side="left",
    )


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """The chat organisms' tokenizer."""
    tokenizer = word_tokenizer(vocabulary(), more=("<system>", "<user>", ASSISTANT))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Write the tokenizer's files into a model directory."""
    build_tokenizer().save_pretrained(directory)
