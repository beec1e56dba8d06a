"""Tiny random models of every family, and a word-level tokenizer for them: what contracts and model tests run on.

Weights are far larger than a fresh initialisation's and norms have uneven gains, so that a wrong hook changes the
answer by much more than rounding does.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from subspace_probe.core.tokens import TokenBatch

LAYERS, VOCAB, CONTEXT = 3, 128, 64
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

# variant -> (family, config class, its settings); every family of LAYOUTS must appear (tests/contracts)
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "GPT2Config", {**_COMMON, "n_inner": 48}),
    "llama": ("llama", "LlamaConfig", _GROUPED),
    "mistral": ("mistral", "MistralConfig", {**_GROUPED, "sliding_window": 5}),
    "mixtral": ("mixtral", "MixtralConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "Qwen2Config", _GROUPED),
    "qwen3": ("qwen3", "Qwen3Config", {**_GROUPED, "head_dim": 12}),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeConfig",
        {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"mlp_only_layers": [1]},
    ),
    "gemma": ("gemma", "GemmaConfig", {**_GROUPED, "head_dim": 12}),
    "gemma2": (
        "gemma2",
        "Gemma2Config",
        {**_GROUPED, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5, "layer_types": _ALTERNATING},
    ),
    "gemma3_text": (
        "gemma3_text",
        "Gemma3TextConfig",
        {**_GROUPED, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5, "layer_types": _ALTERNATING},
    ),
    "phi3": ("phi3", "Phi3Config", _GROUPED),
    "gpt_neox": ("gpt_neox", "GPTNeoXConfig", {**_COMMON, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", "GPTNeoXConfig", {**_COMMON, "use_parallel_residual": False}),
    "gptj": ("gptj", "GPTJConfig", {**_COMMON, "n_inner": 48, "rotary_dim": 4}),
    "olmo2": ("olmo2", "Olmo2Config", _GROUPED),
    "bloom": ("bloom", "BloomConfig", {**_COMMON, "n_layer": LAYERS, "n_head": 4}),
    "falcon": ("falcon", "FalconConfig", {**_COMMON, "ffn_hidden_size": 48}),
    "falcon_new": (
        "falcon",
        "FalconConfig",
        {**_COMMON, "ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_sequential": (
        "falcon",
        "FalconConfig",
        {**_COMMON, "ffn_hidden_size": 48, "parallel_attn": False, "multi_query": False, "alibi": True},
    ),
    "bert": ("bert", "BertConfig", _COMMON),
}


@cache
def tiny(variant: str, **changed: Any) -> Any:
    """A tiny random Hugging Face model in eval mode. Shared between tests: leave it as it is."""
    import transformers

    family, name, settings = VARIANTS[variant]
    config = getattr(transformers, name)(**settings | changed)
    assert config.model_type == family
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, variant)))  # Transformers draws its weights from the global generator
        kind = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # gains and biases, which start even
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@cache
def words() -> Any:
    """A word-level tokenizer over `w3 ... w127`, with pad, bos and unk as tokens 0, 1 and 2."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def text(length: int, seed: int) -> str:
    """Random words of `words()`."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(3, VOCAB, (length,), generator=generator))


def batch(*lengths: int, seed: int = 0) -> "TokenBatch":
    """A left-padded batch of random prompts of the given lengths."""
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.models.chat import encode

    return encode(words(), [Prompt(text(length, seed + 100 * row)) for row, length in enumerate(lengths)])
