"""A model's weights wherever they are: on a device, offloaded to memory or disk, under adapters that are on or off."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subspace_probe.core.errors import BackendError


def weights_of(hf: Any) -> dict[str, Tensor]:
    """Every weight and buffer by its Hugging Face name, with the scales that belong to quantised ones.

    Not `state_dict()`: bitsandbytes repacks 4-bit weights on the CPU when it is called, after which the model computes
    something else.
    """
    found = dict(hf.named_parameters()) | dict(hf.named_buffers())
    for name, value in list(found.items()):
        scales = getattr(getattr(value, "quant_state", None), "absmax", getattr(value, "SCB", None))
        if isinstance(scales, Tensor):
            found[f"{name}.scales"] = scales
    return found


def stored(hf: Any, name: str, value: Tensor) -> Tensor:
    """A weight's numbers; those of an offloaded one are where accelerate's hook fetches them from.

    Raises:
        BackendError: a weight without numbers.
    """
    if not value.is_meta:
        return value
    path, _, leaf = name.rpartition(".")
    for hook in _offloading(hf.get_submodule(path)):
        if getattr(hook, "weights_map", None) is not None:
            return hook.weights_map[leaf]
    raise BackendError(f"The weight {name} is on the meta device, so it has no numbers. Load the checkpoint.")


def input_device(embedding: Any) -> torch.device:
    """Where token ids go: where the embedding computes, not where its weight waits."""
    if not embedding.weight.is_meta:
        return embedding.weight.device
    found = [
        hook.execution_device for hook in _offloading(embedding) if getattr(hook, "execution_device", None) is not None
    ]
    return torch.device(found[0] if found else "cpu")


def weights_hash(hf: Any, weights: Mapping[str, Tensor]) -> str:
    """Hash of all weights by name, one in memory at a time."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(stored(hf, name, value).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def version(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Changes whenever a weight is replaced or written to; costs nothing."""
    return tuple(number for value in weights.values() for number in (value.data_ptr(), value._version))


def adapters(hf: Any) -> str:
    """Which PEFT adapters act; empty for a model without any."""
    acting = [
        f"{name} {'off' if module.disable_adapters else ' '.join(module.active_adapters)}"
        for name, module in hf.named_modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters")
    ]
    return ", ".join(acting)


def _offloading(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
