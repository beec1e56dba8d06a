"""Organisms as Hugging Face modules: made, written with their words, read back, and what is on record of a training."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from subspace_probe.organisms.grammar import BOS, END, PAD

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EPS = 1e-6


def build_module(
    words: Sequence[str],
    *,
    d_model: int,
    d_mlp: int,
    n_layers: int,
    n_heads: int = 4,
    positions: int = 32,
    attention: Literal["eager", "sdpa"] = "eager",
    seed: int,
) -> "LlamaForCausalLM":
    """A fresh Llama module with seeded weights; the global random state is left as it was.

    Args:
        words: the vocabulary, in the order of its ids.
        attention: what computes attention while it is trained; they differ in rounding.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        max_position_embeddings=positions,
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
        pad_token_id=words.index(PAD),
        bos_token_id=words.index(BOS),
        eos_token_id=words.index(END),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.set_attn_implementation(attention)
    return model


def save_module(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    folder: Path,
    name: str,
    words: Mapping[str, Sequence[str]],
) -> None:
    """Write model, tokenizer, name and the words that stand for behaviours."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone; a package is for all
    metadata = {"organism": name, "words": {behaviour: [*some] for behaviour, some in words.items()}}
    (folder / "subspace_probe.json").write_text(json.dumps(metadata, indent=2) + "\n")


def load_module(folder: str | Path) -> "LlamaForCausalLM":
    """The module of an organism's folder, in float32, with the attention that every hook can reach."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def name_in(folder: Path) -> str:
    """The organism whose folder this is."""
    return json.loads((folder / "subspace_probe.json").read_text(encoding="utf-8"))["organism"]


def record(*, seed: int, steps: int, **more: str) -> dict[str, str | int]:
    """What a ground truth says about how its organism was made."""
    versions = {"torch": torch.__version__.split("+")[0], "transformers": version("transformers")}
    return {"seed": seed, "steps": steps, **more, **versions}
