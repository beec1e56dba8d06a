"""The organisms' forward pass in plain tensor operations, for training only.

It reads the parameters of a Hugging Face Llama module and computes the same function, but it can start in the middle
(an edited copy of a row re-runs only the blocks above the edit) and finish a row at one token. Certification does not
use it: that runs the Hugging Face module itself, with its own hooks.

Rows are padded on the right. Attention is causal, so no real token ever sees padding and no mask is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_probe.organisms.modules import EPS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

D_MODEL: Final = 128
N_LAYERS: Final = 4
N_HEADS: Final = 4
D_MLP: Final = 384
ROPE_BASE: Final = 10_000.0
MAX_POSITIONS: Final = 128


def _same(x: Tensor) -> Tensor:
    return x


@final
@dataclass(frozen=True, eq=False)
class _Weights:
    """Parameters of one block, shared with the module (training them trains it)."""

    norm_attn: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    norm_mlp: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


_NAMES: Final = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""Where Hugging Face keeps them, in the order of ``_Weights``."""


@final
class Network:
    """Blocks as functions over a Llama module's parameters."""

    def __init__(self, model: "LlamaForCausalLM") -> None:
        self._embedding = model.get_parameter("model.embed_tokens.weight")
        self._norm = model.get_parameter("model.norm.weight")
        self._unembedding = model.get_parameter("lm_head.weight")
        self._blocks = [
            _Weights(*(model.get_parameter(f"model.layers.{layer}.{name}.weight") for name in _NAMES))
            for layer in range(model.config.num_hidden_layers)
        ]
        self._n_heads: int = model.config.num_attention_heads
        d_head = model.config.hidden_size // self._n_heads
        inverse = 1.0 / ROPE_BASE ** (torch.arange(0, d_head, 2).float() / d_head)
        angles = torch.arange(MAX_POSITIONS).float()[:, None] * inverse
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def embed(self, ids: Tensor) -> Tensor:
        """Input of block 0."""
        return F.embedding(ids, self._embedding)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    def block(self, layer: int, x: Tensor, edit: Callable[[Tensor], Tensor] = _same) -> Tensor:
        """Output of a block; ``edit`` is applied to its input, its attention output and its MLP output."""
        part = self._blocks[layer]
        x = edit(x)
        rows, length, width = x.shape
        y = F.rms_norm(x, (width,), part.norm_attn, EPS)
        qkv = F.linear(y, torch.cat([part.q, part.k, part.v]))
        q, k, v = (t.view(rows, length, self._n_heads, -1).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        cos, sin = self.cos[:length], self.sin[:length]
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, width)
        x = x + edit(F.linear(z, part.o))
        return x + edit(self._mlp(part, x))

    def _mlp(self, part: _Weights, x: Tensor) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], part.norm_mlp, EPS)
        gate, up = F.linear(y, torch.cat([part.gate, part.up])).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, part.down)

    def block_at(self, layer: int, x: Tensor, position: Tensor) -> Tensor:
        """Output of a block at one position per row, ``[rows, d_model]``: all keys, one query, one MLP token."""
        part = self._blocks[layer]
        rows, length, width = x.shape
        row = torch.arange(rows)
        y = F.rms_norm(x, (width,), part.norm_attn, EPS)
        kv = F.linear(y, torch.cat([part.k, part.v]))
        k, v = (t.view(rows, length, self._n_heads, -1).transpose(1, 2) for t in kv.chunk(2, dim=-1))
        q = F.linear(y[row, position], part.q).view(rows, self._n_heads, 1, -1)
        k = self._rotate(k, self.cos[:length], self.sin[:length])
        q = self._rotate(q, self.cos[position][:, None, None], self.sin[position][:, None, None])
        seen = (torch.arange(length) <= position[:, None])[:, None, None]
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).reshape(rows, width)
        out = x[row, position] + F.linear(z, part.o)
        return out + self._mlp(part, out)

    def logits(self, x: Tensor) -> Tensor:
        """Unembedding of final-block outputs."""
        y = F.rms_norm(x, x.shape[-1:], self._norm, EPS)
        return F.linear(y, self._unembedding)
