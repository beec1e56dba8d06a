"""What the benchmarks run on: a model of GPT-2 small's shape with random weights, and prompts of random words."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCAB = 50257


@dataclass(frozen=True)
class Padded:
    """A left-padded batch as every library takes it."""

    ids: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        """Position of every token, as the forward pass of Hugging Face needs and does not work out itself."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def named(self) -> dict[str, Tensor]:
        """Arguments of a Hugging Face forward pass."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}


def gpt2_small(**settings: Any) -> Any:
    """GPT-2 small's shape, weights drawn from seed 0, float32, in eval mode; nothing is downloaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**settings)
    config.architectures = ["GPT2LMHeadModel"]  # as a checkpoint has; TransformerLens goes by it
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None  # every row then generates as many tokens as were asked for
    return model


def words() -> Any:
    """A tokenizer whose word `w17` is token 17, so that prompts and token ids are the same for everybody."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    # Special tokens are found anywhere in a text, so their names must not begin another word's.
    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def drawn(count: int, shortest: int, longest: int, *, vocab: int = VOCAB) -> list[list[int]]:
    """Token ids of prompts of random lengths, drawn with seed 0, in the order in which they were drawn."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in lengths]


def as_text(ids: list[int]) -> str:
    """The prompt that `words()` turns into these ids."""
    return " ".join(f"w{i}" for i in ids)


def padded(prompts: list[list[int]], size: int) -> list[Padded]:
    """Batches in the given order, each padded on the left to its own longest prompt."""
    return [_pad(prompts[start : start + size]) for start in range(0, len(prompts), size)]


def _pad(rows: list[list[int]]) -> Padded:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return Padded(ids, mask)
