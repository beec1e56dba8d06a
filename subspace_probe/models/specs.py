"""What a model is, read from its configuration and its modules."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from subspace_probe.core.protocols import ModelSpec
from subspace_probe.models.layouts import Layout


def spec_of(hf: Any, layout: Layout, blocks: Sequence[nn.Module], name: str) -> ModelSpec:
    """A model's spec in the package's own words."""
    config = hf.config
    n_heads = int(config.num_attention_heads)
    return ModelSpec(
        name=name,
        family=type(hf).__name__,
        n_layers=len(blocks),
        d_model=int(config.hidden_size),
        n_heads=n_heads,
        d_head=_inputs_of(blocks[0].get_submodule(layout.z), int(config.hidden_size)) // n_heads,
        d_vocab=int(config.vocab_size),
        context=_context(config),
        unsupported=layout.unsupported(config),
        encoder=layout.post_norm,
        learned_positions=layout.learned_positions,
    )


def mlp_widths(blocks: Sequence[nn.Module], layout: Layout, d_model: int) -> tuple[int | None, ...]:
    """Width of `mlp_post` in every block; None where the block has no such projection."""
    found: list[int | None] = []
    for block in blocks:
        module = dict(block.named_modules()).get(layout.mlp_post) if layout.mlp_post else None
        found.append(None if module is None else _inputs_of(module, d_model))
    return tuple(found)


def _inputs_of(module: Any, outputs: int) -> int:
    """Width of a projection's input. Quantised weights are packed, so their shape says nothing; `in_features` does."""
    if hasattr(module, "in_features"):
        return int(module.in_features)
    # GPT-2's Conv1D keeps (in, out)
    return next((int(size) for size in module.weight.shape if size != outputs), outputs)


def _context(config: Any) -> int:
    """How many tokens a model takes; ALiBi families state what they were trained on, or nothing."""
    for name in ("max_position_embeddings", "seq_length"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    return 2048
