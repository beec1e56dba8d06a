"""One row per Hugging Face family: where its streams are.

Paths are relative to a block; `blocks` and `norm` are relative to the model's `base_model`. `attn` and `mlp` name the
module whose *output is added to the residual stream*: in families with a norm behind attention, that norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from subspace_probe.core.errors import BackendError
from subspace_probe.core.sites import Stream

_PARALLEL = (
    "this model adds attention and MLP in parallel, so there is no state between them. Use attn_out or resid_post."
)
FUSED = "its experts are one fused module, so no single down projection can be hooked. Use mlp_out."
_NORM = "a norm stands between {} and the residual stream, and its gains write what was taken out back"

READERS = frozenset(
    (
        "q_proj k_proj v_proj qkv_proj query_key_value c_attn "  # into attention
        "gate_proj up_proj gate_up_proj dense_h_to_4h c_fc fc_in gate "  # into the MLP, and routers
        "q_norm k_norm ln_1 ln_2 ln_attn ln_mlp input_layernorm post_attention_layernorm"
    ).split()
)
"""The last name of every weight of a block that reads the stream or works inside attention or MLP. One that is neither
here nor a writer of its layout may write to the stream, so nothing is taken out of such a model's weights."""


def _never(config: Any) -> bool:
    return False


def _always(config: Any) -> bool:
    return True


def _says_so(config: Any) -> bool:
    return config.use_parallel_residual


def _falcon(config: Any) -> bool:
    return config.new_decoder_architecture or config.parallel_attn


@final
@dataclass(frozen=True)
class Layout:
    """Where one family keeps its streams.

    Attributes:
        blocks: the list of blocks.
        norm: the final norm in front of the unembedding; empty for encoders.
        attn: module whose output is `attn_out`.
        mlp: module whose output is `mlp_out`.
        z: the attention's output projection, whose input is `z`.
        mlp_post: the MLP's down projection, whose input is `mlp_post`; empty where experts are fused.
        resid_mid: module whose output is `resid_mid` itself, in post-norm families; empty where `resid_mid` is
            `resid_pre + attn_out` and is written through `attn_out`.
        attention: the attention module itself, which returns patterns beside its output.
        parallel: whether attention and MLP run in parallel, from the config.
        in_place: whether the block adds to the MLP's output in place.
        learned_positions: whether positions are added to the embeddings, so that one token's layer-0 state differs by
            place.
        embeddings: the modules whose outputs sum up to the first block's input, up to a scalar; relative to the
            model's `base_model`.
        embedding_norm: a norm behind them.
        down: the MLP's last matrices where `mlp_post` is not the only one: modules, or tensors of fused experts
            [expert, d_model, d_expert]; a block may lack some.
    """

    blocks: str = "layers"
    norm: str = "norm"
    attn: str = "self_attn"
    mlp: str = "mlp"
    z: str = "self_attn.o_proj"
    mlp_post: str = "mlp.down_proj"
    resid_mid: str = ""
    attention: str = "self_attn"
    parallel: Callable[[Any], bool] = _never
    in_place: bool = False
    learned_positions: bool = False
    embeddings: tuple[str, ...] = ("embed_tokens",)
    embedding_norm: str = ""
    down: tuple[str, ...] = ()

    @property
    def post_norm(self) -> bool:
        """Whether residual states are normed after each addition (encoders)."""
        return bool(self.resid_mid)

    @property
    def projects_inside(self) -> bool:
        """Whether the output projection is part of the attention module."""
        return self.z.startswith(f"{self.attention}.")

    @property
    def adds_inside(self) -> bool:
        """Whether `attn_out` is the output of a part of the attention module."""
        return self.attn.startswith(f"{self.attention}.")

    @property
    def writers(self) -> tuple[str, ...]:
        """What a block writes to the stream with: attention's output projection and the MLP's last matrices."""
        return self.z, *(self.down or (self.mlp_post,))

    @property
    def rewritten(self) -> str:
        """Why the stream is more than a sum of what the writers wrote; empty where it is that sum."""
        if self.post_norm:
            return "residual states are normed after each addition, and the norms' gains write what was taken out back"
        if self.embedding_norm:
            return _NORM.format("the embedding")
        homes = ((self.z, self.attn), *((path, self.mlp) for path in self.writers[1:]))
        if any(not f"{path}.".startswith(f"{home}.") for path, home in homes):
            return _NORM.format("attention's and the MLP's last projections")
        return ""

    def unsupported(self, config: Any) -> dict[Stream, str]:
        """Streams this model lacks, with the reason. Parallel blocks are the config's word, not the family's."""
        reasons: dict[Stream, str] = {}
        if self.parallel(config):
            reasons["resid_mid"] = _PARALLEL
        if not self.mlp_post:
            reasons["mlp_post"] = FUSED
        return reasons


_LLAMA = Layout()
_NORMED = Layout(attn="post_attention_layernorm", mlp="post_feedforward_layernorm")

LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(
        blocks="h",
        norm="ln_f",
        attn="attn",
        z="attn.c_proj",
        mlp_post="mlp.c_proj",
        attention="attn",
        learned_positions=True,
        embeddings=("wte", "wpe"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Layout(mlp_post="", down=("mlp.experts.down_proj",)),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": Layout(mlp_post="", down=("mlp.experts.down_proj", "mlp.down_proj")),
    "gemma": _LLAMA,
    "gemma2": _NORMED,
    "gemma3_text": _NORMED,
    "phi3": _LLAMA,
    "gpt_neox": Layout(
        norm="final_layer_norm",
        attn="attention",
        z="attention.dense",
        mlp_post="mlp.dense_4h_to_h",
        attention="attention",
        parallel=_says_so,
        embeddings=("embed_in",),
    ),
    "gptj": Layout(
        blocks="h",
        norm="ln_f",
        attn="attn",
        z="attn.out_proj",
        mlp_post="mlp.fc_out",
        attention="attn",
        parallel=_always,
        embeddings=("wte",),
    ),
    "olmo2": _NORMED,
    # bloom's attention and MLP modules add the stream themselves; what they add to it leaves their last matrices
    "bloom": Layout(
        blocks="h",
        norm="ln_f",
        attn="self_attention.dense",
        mlp="mlp.dense_4h_to_h",
        z="self_attention.dense",
        mlp_post="mlp.dense_4h_to_h",
        attention="self_attention",
        embeddings=("word_embeddings",),
        embedding_norm="word_embeddings_layernorm",
    ),
    "falcon": Layout(
        blocks="h",
        norm="ln_f",
        attn="self_attention",
        z="self_attention.dense",
        mlp_post="mlp.dense_4h_to_h",
        attention="self_attention",
        parallel=_falcon,
        in_place=True,
        embeddings=("word_embeddings",),
    ),
    "bert": Layout(
        blocks="encoder.layer",
        norm="",
        attn="attention.output.dense",
        mlp="output.dense",
        z="attention.output.dense",
        mlp_post="output.dense",
        resid_mid="attention.output",
        attention="attention.self",
        learned_positions=True,
        embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"),
        embedding_norm="embeddings.LayerNorm",
    ),
}
"""Hugging Face `config.model_type` to layout. Adding a family is one row."""


def layout_of(config: Any) -> Layout:
    """The layout of a model.

    Raises:
        BackendError: a family without a row.
    """
    family = str(config.model_type)
    if family not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise BackendError(
            f"Models of type {family!r} have no layout here. Known: {known}. "
            "Add one row to subspace_probe/models/layouts.py; the residual identities are checked on load."
        )
    return LAYOUTS[family]
