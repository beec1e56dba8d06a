"""From prompts to the rows that a probe reads: the position rule, and one visit to the model."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import DataError, StaleStore
from subspace_probe.core.keys import content_key
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import ALL, LAST, T_INST, Where
from subspace_probe.models.hooked import HookedModel


def usual_where(model: HookedModel) -> Where:
    """The position rule of a model where none is given.

    The last token of the instruction, where harmfulness sits whatever the model will do (Zhao et al. 2025, section 3);
    the last token without a chat template; all tokens of an encoder, whose mean is its usual sentence embedding.
    """
    return T_INST if model.chats else ALL if model.spec.encoder else LAST


def template_key(model: HookedModel) -> str:
    """Hash of the chat template and its options; what a prompt is wrapped in decides what a position means."""
    template = getattr(model.tokenizer, "chat_template", None)
    return content_key([repr(template), repr(sorted(model.template_kwargs.items()))])


@runtime_checkable
class Shape(Protocol):
    """What a guard needs of the model that it was made for: its size."""

    @property
    def name(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...


def require_like(made_for: Shape, template: str, model: HookedModel) -> None:
    """Check that a guard's layers and position mean the same in another model.

    Args:
        made_for: the model the guard was made for.
        template: the `template_key` it was made with.

    Raises:
        StaleStore: another size, or another chat template.
    """
    spec, found = model.spec, template_key(model)
    if (made_for.n_layers, made_for.d_model) != (spec.n_layers, spec.d_model):
        raise StaleStore(
            f"The guard was made for {made_for.name} with {made_for.n_layers} layers of width {made_for.d_model}, and "
            f"{spec.name} has {spec.n_layers} of width {spec.d_model}. Load the guard's own model, or fit a new guard."
        )
    if found != template:
        raise StaleStore(
            f"The guard was made for another chat template ({template[:8]}) than {spec.name} has now ({found[:8]}): "
            "what it reads lies in other surroundings. Restore the template or its options (template_kwargs), or fit a "
            "new guard."
        )


def states_of(
    model: HookedModel, prompts: Sequence[Prompt], sites: Sequence[Site], where: Where, *, batch_tokens: int
) -> NDArray[np.float64]:
    """States of prompts, shape [n, len(sites) * width]; the pass ends at the deepest site."""
    acts = model.capture(prompts, sites=list(sites), where=where, dtype=torch.float32, batch_tokens=batch_tokens)
    return rows_of(acts, sites)


def rows_of(acts: Activations, sites: Sequence[Site]) -> NDArray[np.float64]:
    """One row a prompt, shape [n, len(sites) * width]: the mean over its tokens where there are many.

    Raises:
        DataError: a prompt without a token.
    """
    n = len(acts.contrast)
    counts = torch.bincount(acts.prompt, minlength=n)
    if bool((counts == 0).any()):
        row = int((counts == 0).nonzero()[0, 0])
        raise DataError(f"Prompt {row} has no token {str(acts.where)!r}, so there is nothing to read. Choose another.")
    blocks = []
    for site in sites:
        states = acts.at(site).double().cpu()
        if not acts.where.single:
            sums = torch.zeros(n, states.shape[1], dtype=torch.float64).index_add_(0, acts.prompt, states)
            states = sums / counts[:, None]
        blocks.append(states)
    return torch.cat(blocks, dim=1).numpy()


def given_states(acts: Activations, sites: Sequence[Site], where: Where, fingerprint: str) -> NDArray[np.float64]:
    """Rows of activations that were captured before, if they are what the guard reads.

    Raises:
        StaleStore: read at other tokens, or from another model.
        SiteError: without one of the sites.
    """
    if acts.where != where:
        raise StaleStore(
            f"The guard reads {str(where)!r}, and these activations are of {str(acts.where)!r}. Directions read at "
            "other tokens are other directions. Capture them at the guard's position."
        )
    if (found := acts.notes.get("fingerprint")) != fingerprint:
        raise StaleStore(
            f"These activations come from another model ({found}) than the guard's ({fingerprint}). Capture them anew."
        )
    return rows_of(acts, sites)
