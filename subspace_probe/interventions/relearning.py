"""Relearning: a few steps on a few answers, to see whether others come back that were not taught.

A model from which something is gone has to be told all of it. One that merely no longer says it gives the rest back
once a part is taught (Lynch et al. 2024, arXiv:2402.16835; Deeb & Roger 2024, arXiv:2410.08827).
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from tqdm.auto import tqdm

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.prompts import Prompt
from subspace_probe.models.hooked import HookedModel


def relearn(
    model: HookedModel, prompts: Sequence[Prompt], *, steps: int = 20, lr: float = 1e-3, progress: bool = False
) -> HookedModel:
    """A copy of a model whose weights, all of them, were trained by cross-entropy on the first token of the answers.

    All prompts are in every step, so there is no order and no seed. Costs the memory of a second copy, and Adam's.

    Args:
        prompts: with answers; few.

    Raises:
        ConfigError: no prompts, prompts without answers, or weights in half precision.
    """
    if not prompts or any(not prompt.answer for prompt in prompts):
        raise ConfigError(f"{len(prompts)} prompts were given to relearn from. Give some, each with an answer.")
    if model.backend.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"{model.spec.name} is in {model.backend.dtype}. Load it with dtype=float32 to train it.")
    hf = deepcopy(model.backend.hf)
    backend = type(model.backend)(hf, name=f"{model.spec.name}, relearned")
    changed = HookedModel(backend, model.tokenizer, template_kwargs=model.template_kwargs, words=model.words)
    batch = model.tokens(prompts)
    wanted = torch.tensor(model.token_ids([prompt.answer or "" for prompt in prompts]), device=backend.device)
    weights = [weight.requires_grad_(True) for weight in hf.parameters()]
    optimiser = torch.optim.Adam(weights, lr=lr)
    for _ in tqdm(range(steps), "relearn", disable=not progress):
        logits = changed.run(batch, logits_to_keep=1, grad=True).logits
        if logits is None:
            raise ConfigError(f"{model.spec.family} gives no logits, so it has no answers to relearn. Use a decoder.")
        loss = torch.nn.functional.cross_entropy(logits[:, -1].float(), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    for weight in weights:
        weight.requires_grad_(False)
    return changed
