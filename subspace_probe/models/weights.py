"""A model's weights wherever they are: on a device, offloaded to memory or disk, under adapters that are on or off."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subspace_probe.core.errors import BackendError, ConfigError
from subspace_probe.models.layouts import READERS, Layout

_AT_RUN_TIME = "Take it out at run time instead (Ablate)."


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


def stream_writers(hf: Any, layout: Layout) -> dict[str, Tensor]:
    """Every weight that writes to the residual stream, by its name in the base model, as rows that are written.

    Rows are views of shape [..., d_model]: token and position embeddings, the output and down projections of every
    block, those of every expert, and their biases. A model with anything else that may reach the stream is refused,
    since a list that lacks one is worse than none.

    Raises:
        ConfigError: the stream is more than their sum (norms, adapters), a weight has no rows to change (quantised,
            offloaded) or belongs to a reader as well, or the use of one is not known.
    """
    _require_plain(hf, layout)
    found, unknown = dict[str, nn.Parameter](), list[str]()
    for name, weight in hf.base_model.named_parameters(remove_duplicate=False):
        path = name.removesuffix(".weight").removesuffix(".bias")
        inner = path.removeprefix(f"{layout.blocks}.").partition(".")[2] if path.startswith(f"{layout.blocks}.") else ""
        if path in layout.embeddings or inner in layout.writers:
            found[name] = weight
        elif path != layout.norm and inner.rpartition(".")[2] not in READERS:
            unknown.append(name)
    if unknown:
        raise ConfigError(
            f"{type(hf).__name__} has weights of which it is not known whether they write to the residual stream: "
            f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}. {_AT_RUN_TIME}"
        )
    _require_complete(hf, layout, found)
    return {name: _rows(hf, name, weight) for name, weight in found.items()}


def untie(hf: Any) -> None:
    """Give the unembedding a weight of its own, in place, and have the configuration say so.

    Saving, loading and `tie_weights` then keep the two apart.
    """
    head = hf.get_output_embeddings()
    if head is None:
        return
    if head.weight is hf.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    hf.config.tie_word_embeddings = False
    hf.all_tied_weights_keys = hf.get_expanded_tied_weights_keys(all_submodels=False)


def _require_plain(hf: Any, layout: Layout) -> None:
    family = type(hf).__name__
    if layout.rewritten:
        raise ConfigError(
            f"Taking a subspace out of the weights of {family} does not take it out of its residual stream: "
            f"{layout.rewritten}. {_AT_RUN_TIME}"
        )
    if adapters(hf):
        raise ConfigError(
            f"{family} has adapters, which write to the residual stream beside its weights. Merge them first "
            "(merge_and_unload)."
        )
    if getattr(hf.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"The weights of {family} are quantised, too coarsely for a subspace to be taken out. Load it unquantised."
        )


def _require_complete(hf: Any, layout: Layout, found: Mapping[str, nn.Parameter]) -> None:
    """Check that embeddings and every block have writers, and that no weight is a writer and something else at once."""
    paths = {name.removesuffix(".weight").removesuffix(".bias") for name in found}
    missing = [path for path in layout.embeddings if path not in paths]
    for index, _ in enumerate(hf.base_model.get_submodule(layout.blocks)):
        block, (out, *down) = f"{layout.blocks}.{index}", layout.writers
        missing += [] if f"{block}.{out}" in paths else [f"{block}.{out}"]
        missing += [] if paths & {f"{block}.{path}" for path in down} else [f"{block}.{down[0]}"]
    if missing:
        raise ConfigError(
            f"{type(hf).__name__} keeps no weight at {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}, "
            f"where what writes to the residual stream was expected. {_AT_RUN_TIME}"
        )
    head, uses = hf.get_output_embeddings(), Counter(id(w) for _, w in hf.named_parameters(remove_duplicate=False))
    for name, weight in found.items():
        known = sum(other is weight for other in found.values()) + (head is not None and head.weight is weight)
        if uses[id(weight)] > known:
            raise ConfigError(
                f"{name} writes to the residual stream and is at the same time another weight of {type(hf).__name__}. "
                "Give that one a copy of its own."
            )


def _rows(hf: Any, name: str, weight: nn.Parameter) -> Tensor:
    from transformers.pytorch_utils import Conv1D

    module, width = hf.base_model.get_submodule(name.rpartition(".")[0]), hf.config.hidden_size
    if weight.is_meta:
        raise ConfigError(f"{name} is offloaded, so it cannot be changed here. Load the whole model into memory.")
    # wrappers of packed weights are subclasses; eight-bit floats need scales beside them
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:
        kind = f"{type(weight).__name__} of {weight.dtype}"
        raise ConfigError(f"{name} is not an ordinary floating-point weight but a {kind}. Load the model unquantised.")
    if weight.ndim == 1:
        rows = weight[None]
    elif isinstance(module, nn.Embedding | Conv1D):
        rows = weight
    elif isinstance(module, nn.Linear) or weight.ndim == 3:  # fused experts are three-dimensional
        rows = weight.mT
    else:
        raise ConfigError(f"{name} belongs to a {type(module).__name__}, whose layout is not known. {_AT_RUN_TIME}")
    if rows.shape[-1] != width:
        raise ConfigError(f"{name} has shape {tuple(weight.shape)} and no axis of d_model = {width} where expected.")
    return rows


def _offloading(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
