"""Models between two checkpoints: weights on the straight line from one to the other."""

from copy import deepcopy

import torch

from subspace_probe.core.errors import ConfigError
from subspace_probe.models.hooked import HookedModel
from subspace_probe.models.weights import adapters


def blended(start: HookedModel, end: HookedModel, share: float) -> HookedModel:
    """The model with weights (1 - share) start + share end, each parameter by itself, rounded once.

    Args:
        start: a checkpoint; left as it is.
        end: another of the same shapes, such as a fine-tune of it; its tokenizer and template are kept.
        share: 0 is `start`, 1 is `end`.

    Raises:
        ConfigError: weights of other names or shapes, adapters, or standing interventions.
    """
    first, second = start.backend.hf, end.backend.hf
    if start.standing_sites or end.standing_sites or adapters(first) or adapters(second):
        raise ConfigError("Models with adapters or standing interventions are not their weights alone. Merge them.")
    given, made = dict(first.named_parameters()), deepcopy(second)
    names = {name: tuple(value.shape) for name, value in made.named_parameters()}
    if names != {name: tuple(value.shape) for name, value in given.items()}:
        raise ConfigError(
            f"{start.spec.name} and {end.spec.name} do not have weights of the same names and shapes, so there is "
            "nothing between them. Give two checkpoints of one model."
        )
    with torch.no_grad():
        for name, value in made.named_parameters():
            wide = torch.promote_types(value.dtype, torch.float32)
            mixed = torch.lerp(given[name].to(value.device, wide), value.to(wide), share)
            value.copy_(mixed.to(value.dtype))
    made_name = f"{share:.0%} of the way from {start.spec.name} to {end.spec.name}"
    backend = type(end.backend)(made, name=made_name)
    return HookedModel(backend, end.tokenizer, template_kwargs=end.template_kwargs, words=end.words)
