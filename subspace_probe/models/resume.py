"""Continuing a pass in the middle: above a block, and from a token on.

A clean pass is recorded once: the state in front of a block, what each later block was called with, and the keys and
values of the tokens before the first one that will be edited. A pass continued from there computes nothing below the
block and nothing before the token, because in a causal model neither can change.
"""

import inspect
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from subspace_probe.core.protocols import Prefix

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
Cached = Mapping[int, tuple[Tensor, Tensor]]


@final
class _Slot:
    """Stands where a block was given its cache; a continued pass puts its own there."""


_CACHE = _Slot()


def named_call(block: nn.Module, call: Call) -> dict[str, Any]:
    """Arguments of a block besides its input, all by name."""
    from transformers import Cache

    args, kwargs = call
    names = list(inspect.signature(type(block).forward).parameters)[2:]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: _CACHE if isinstance(value, Cache) else value for name, value in named.items()}


def earlier_keys(cache: Any, layers: range, column: int, width: int) -> Cached | None:
    """Keys and values of the tokens before `column`; None where a layer has not kept them all (sliding windows)."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        kept = cache.layers[layer]
        if kept.keys is None or kept.keys.shape[-2] != width:
            return None
        found[layer] = kept.keys[..., :column, :], kept.values[..., :column, :]
    return found


def from_column(call: Mapping[str, Any], column: int, width: int, attention: str) -> dict[str, Any]:
    """A block's arguments for the tokens from `column` on."""
    cut = {name: _cut(value, column, width) for name, value in call.items()}
    if cut.get("attention_mask") is None and "attention_mask" in call:
        # Transformers leaves the mask out where nothing is padded and lets the kernel assume a square causal one
        queries = torch.arange(column, width)[:, None]
        seen = (torch.arange(width)[None] <= queries)[None, None]
        cut["attention_mask"] = seen if attention == "sdpa" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    return cut


def continued(blocks: list[nn.Module], prefix: Prefix) -> Tensor:
    """Run the remaining blocks; returns the last one's output, shape [batch, pos - column, d_model]."""
    hidden, cache = prefix.hidden, _cache_of(prefix.cached)
    for index in range(prefix.layer, len(blocks)):
        output = blocks[index](hidden, **completed(prefix.calls[index], cache, hidden))
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def completed(call: Mapping[str, Any], cache: Any, hidden: Tensor) -> dict[str, Any]:
    """A recorded call with this pass's cache in it, on the device and in the dtype of its states."""
    return _placed({name: cache if value is _CACHE else value for name, value in call.items()}, hidden)


def _cache_of(cached: Cached) -> Any:
    """A cache that holds the earlier tokens; a fresh one for every pass, because passes add to it."""
    if not cached:
        return None
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in cached.items():
        cache.update(keys, values, layer)
    return cache


def _placed(call: Mapping[str, Any], hidden: Tensor) -> dict[str, Any]:
    """The mask that `from_column` made, on the device and in the dtype of the states."""
    mask = call.get("attention_mask")
    if not isinstance(mask, Tensor):
        return dict(call)
    mask = mask.to(hidden.device) if mask.dtype == torch.bool else mask.to(hidden.device, hidden.dtype)
    return {**call, "attention_mask": mask}


def _cut(value: Any, column: int, width: int) -> Any:
    """Query positions from `column` on: of masks [b, h, q, k], rotations [b, q, d], ids [b, q] and positions [q]."""
    if isinstance(value, tuple):
        return tuple(_cut(item, column, width) for item in value)
    if isinstance(value, dict):
        return {name: _cut(item, column, width) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    axis = {4: 2, 3: 1, 2: 1, 1: 0}.get(value.ndim)
    if axis is None or value.shape[axis] != width:
        return value
    return value.narrow(axis, column, width - column)
