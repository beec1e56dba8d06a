"""Gradients of a behaviour with respect to the states of one site.

Whatever lies below the site is computed once and without a graph (`Prefix`); the pass that is differentiated begins at
the site's block and at the first token asked for.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.edits import At
from subspace_probe.core.errors import ConfigError, PositionError, ShapeError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Metric
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.linalg.finite import all_finite
from subspace_probe.models.capturing import Limits, batches
from subspace_probe.models.hooked import HookedModel


def metric_gradients(
    model: HookedModel,
    prompts: Sequence[Prompt],
    site: Site,
    where: Where,
    metric: Metric,
    *,
    states: Float[Tensor, "n width"] | None = None,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> Float[Tensor, "n width"]:
    """The gradient of every prompt's metric with respect to its states at a site, in metric units per activation unit.

    Args:
        where: which tokens. One token a prompt gives one row a prompt, in their order; several give one row a token,
            prompt by prompt, the rows that `model.capture` gives for the same `where`. The gradients of several tokens
            of one prompt are partial ones: each says what its own token does while the others stay.
        metric: of the last-token logits; differentiable, and of each prompt alone.
        states: take the gradient at these states, put in the place of the model's own; for instance along a path
            between two prompts. Rows as in the result.
        batch_tokens: how many tokens, pads included, one pass may have.
        progress: show a bar.

    Returns:
        Shape [n, width], on the CPU, in the model's dtype and at least float32. Zeros where nothing that is computed
        from the state reaches the last token's logits.

    Raises:
        ConfigError: a metric without a gradient (accuracy), or an encoder, which has no next token.
        PositionError: no prompt has such a token.
        ShapeError: `states` of another shape, a metric that does not give one number a prompt, non-finite gradients.
        SiteError: no such site.
    """
    if model.spec.encoder:
        raise ConfigError(f"{model.spec.family} is an encoder and has no next-token logits. Use a decoder model.")
    width, n_layers = model.backend.width(site), model.spec.n_layers
    entry = site.resolve(n_layers).lifted(n_layers, model.standing_sites)
    batch = model.tokens(prompts)
    counts = (batch.select(where, batch.positions) & batch.mask).sum(-1)
    starts, n = counts.cumsum(0) - counts, int(counts.sum())
    if n == 0:
        raise PositionError(f"No token of these prompts is {str(where)!r}, so there is no state to differentiate by.")
    if states is not None and states.shape != (n, width):
        raise ShapeError(
            f"States of shape {tuple(states.shape)} were given for {n} tokens at {site.short}, which is {width} wide. "
            "Give one row a token, in the order of the prompts."
        )
    out = torch.zeros(n, width, dtype=torch.promote_types(model.backend.dtype, torch.float32))
    with tqdm(total=batch.size, desc="gradients", unit="prompt", disable=not progress, leave=False) as bar:
        for chosen in batches(batch.lengths.tolist(), Limits(batch_tokens)):
            if rows := [row for row in chosen if counts[row]]:
                places = torch.cat([torch.arange(int(counts[row])) + starts[row] for row in rows])
                probe = _Probe(None if states is None else states[places])
                shown = [prompts[row] for row in rows]
                out[places] = _differentiated(model, batch.rows(rows), shown, entry, where, metric, probe).to(out)
            bar.update(len(chosen))
    if not all_finite(out):
        raise ShapeError(
            f"The gradients at {site.short} are not finite in {str(model.backend.dtype)[6:]}. Load the model in "
            "float32 or bfloat16, or look for a metric that is infinite."
        )
    return out


@final
class _Probe:
    """A change of states that adds nothing, and keeps the nothing that was added: what is differentiated by.

    Args:
        states: put in the place of what came, shape [n, width].
    """

    def __init__(self, states: Tensor | None) -> None:
        self.states = states
        self.added: list[Tensor] = []

    def __call__(self, x: Float[Tensor, "n d"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        nothing = torch.zeros_like(x, requires_grad=True)
        self.added.append(nothing)
        return (x if self.states is None else self.states.to(x)) + nothing


def _differentiated(
    model: HookedModel,
    batch: TokenBatch,
    prompts: Sequence[Prompt],
    entry: Site,
    where: Where,
    metric: Metric,
    probe: _Probe,
) -> Tensor:
    """Gradients of one batch, shape [tokens, width]; prompts do not see each other, so one backward pass serves all."""
    selected = batch.select(where, batch.positions) & batch.mask
    prefix = model.prefix(batch, entry.layer, column=int(selected.any(0).nonzero()[0]))
    edits = {entry: At(where, probe)}
    logits: Any = model.run(prefix.batch, writes=edits, prefix=prefix, logits_to_keep=1, grad=True).logits
    (gradient,) = torch.autograd.grad(summed(metric, logits, prompts), probe.added)
    return gradient.cpu()


def summed(metric: Metric, logits: Float[Tensor, "n kept d_vocab"], prompts: Sequence[Prompt]) -> Float[Tensor, ""]:
    """The sum over prompts of a metric of last-token logits that carry a graph, whatever the caller's grad mode.

    Raises:
        ShapeError: one that does not give one number a prompt.
        ConfigError: one without a gradient.
    """
    with torch.enable_grad():
        last = logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32)).cpu()
        values = metric(last, prompts)
        total = values.sum()
    if values.shape != (len(prompts),):
        raise ShapeError(
            f"The metric gave shape {tuple(values.shape)} for {len(prompts)} prompts. Give one number each."
        )
    if not values.requires_grad:
        raise ConfigError(
            "The metric has no gradient with respect to the logits: it counts or compares. Take a differentiable one, "
            "such as logit_difference or refusal_score."
        )
    return total
