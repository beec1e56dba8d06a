"""A model's weights wherever they are: on a device, offloaded to memory or disk, under adapters that are on or off."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subspace_probe.core.errors import BackendError


def bare(model: Any) -> Any:
    """The model under PEFT adapters, which stay active in its modules; any other model as it is.

    Raises:
        BackendError: adapters outside the modules, such as learned prompts.
    """
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise BackendError("The model has a learned prompt (PEFT prompt learning), which lies outside its modules.")
    return model.get_base_model()


def weights_of(hf: Any) -> dict[str, Tensor]:
    """Every weight and saved buffer by its Hugging Face name, with the scales that belong to quantised ones.

    Not `state_dict()`: bitsandbytes repacks 4-bit weights on the CPU when it is called, after which the model computes
    something else.
    """
    found: dict[str, Tensor] = dict(hf.named_parameters())
    for path, module in hf.named_modules():
        # buffers that are not saved are working memory: some families rewrite theirs in every pass
        kept = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
        found |= {f"{path}.{name}": module._buffers[name] for name in kept if module._buffers[name] is not None}
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
    """Changes when a weight is replaced or written to, but for writes through `.data`; costs nothing."""
    written = ((value.data_ptr(), 0 if value.is_inference() else value._version) for value in weights.values())
    return tuple(number for pair in written for number in pair)


def adapters(hf: Any) -> str:
    """Which PEFT adapters act, and how strongly; empty for a model without any."""
    acting: list[str] = []
    for name, module in hf.named_modules():
        # of the same name, but methods, on every Transformers model
        if isinstance(getattr(module, "disable_adapters", None), bool):
            state = "off" if module.disable_adapters else " ".join(module.active_adapters)
            how = [getattr(module, key, None) for key in ("scaling", "use_dora", "use_rslora", "merged_adapters")]
            acting.append(f"{name} {state} {how}")
    return ", ".join(acting)


def architecture(config: Any) -> str:
    """What a configuration says about the computation, and not about where the model came from."""
    passing = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
    body = {name: value for name, value in config.to_dict().items() if name not in passing and "attn_impl" not in name}
    return repr(sorted(body.items(), key=lambda item: item[0]))


def _offloading(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
