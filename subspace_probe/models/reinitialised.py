"""A copy of a model that has learned nothing: the control for everything that is trained on a model."""

from typing import Any

import torch

from subspace_probe.core.errors import BackendError
from subspace_probe.models.hooked import HookedModel
from subspace_probe.models.weights import adapters


def reinitialised(model: HookedModel, *, seed: int) -> HookedModel:
    """The same architecture with fresh weights, drawn as its own class draws them; the given model is left alone.

    What an optimiser finds in it comes from the optimiser and the architecture (Arora et al. 2024, arXiv:2402.12560).
    Costs the memory of a second copy.

    Raises:
        BackendError: adapters or quantised weights, of which there is no fresh copy.
    """
    hf: Any = model.backend.hf
    if adapters(hf) or getattr(hf, "is_quantized", False):
        raise BackendError(
            f"{model.spec.name} has adapters or quantised weights, and no fresh copy can be drawn of those. Merge the "
            "adapters or load it unquantised, or leave this control out."
        )
    # Transformers draws from the global generators; the caller's states come back
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = type(hf.config).from_dict(hf.config.to_dict())
        config._attn_implementation = model.backend.attention
        fresh = type(hf)(config)
    fresh = fresh.to(device=model.backend.device, dtype=model.backend.dtype).eval()
    backend = type(model.backend)(fresh, name=f"{model.spec.name}, re-initialised")
    return HookedModel(backend, model.tokenizer, template_kwargs=model.template_kwargs, words=model.words)
