"""Do the backends agree on this very model? Reads, writes, gradients and generated text, against the native backend.

A claim that depends on one hooking stack is not a claim. Every difference is in units of the largest activation (or
logit, or gradient) of its kind, over real tokens: what stands at pads differs between attention kernels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.edits import At, EditMap
from subspace_probe.core.errors import UnsupportedSite
from subspace_probe.core.sites import FORWARD_ORDER, READ_ONLY, Site
from subspace_probe.core.tokens import ALL, LAST, TokenBatch
from subspace_probe.models.backend import Backend

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest difference between exact computations in another order; half precision rounds at every step."""
HALF = 5e-2

Measure = tuple[str, str, Callable[[Backend], Tensor]]
"""Kind, what, and the function that is compared."""


@final
@dataclass(frozen=True)
class Difference:
    """One comparison.

    Attributes:
        kind: "read", "write", "gradient" or "text".
        what: the site, or what was generated.
        found: largest difference of each backend to the native one; what it said where it refused.
    """

    kind: str
    what: str
    found: Mapping[str, float | str]

    def worst(self) -> float:
        """The largest difference; 0 where every backend refused."""
        return max((value for value in self.found.values() if isinstance(value, float)), default=0.0)


def tolerance(model: Backend) -> float:
    """How far apart backends may be in this model's dtype."""
    return TOLERANCE.get(model.dtype, HALF)


def compare(
    native: Backend, others: Mapping[str, Backend], batch: TokenBatch, *, layers: Sequence[int], new_tokens: int = 8
) -> Iterator[Difference]:
    """Compare backends over one model, a site and an edit at a time.

    Args:
        batch: prompts of unequal length, so that padding is part of the test.
        layers: which blocks to compare.
        new_tokens: how much text to generate under an edit.
    """
    batch = batch.to(native.device)
    for kind, what, measure in _measures(native, batch, layers, new_tokens):
        try:
            wanted = measure(native)
        except UnsupportedSite:
            continue
        found: dict[str, float | str] = {}
        for name, model in others.items():
            try:
                found[name] = _difference(measure(model), wanted)
            except UnsupportedSite as error:
                found[name] = str(error)
        yield Difference(kind, what, found)


def _measures(native: Backend, batch: TokenBatch, layers: Sequence[int], new_tokens: int) -> Iterator[Measure]:
    sites = [Site(layer, name) for layer in layers for name in FORWARD_ORDER if name not in native.spec.unsupported]
    sites += [Site(layer, "z", native.spec.n_heads - 1) for layer in layers]
    for site in sites:
        yield "read", site.short, partial(_read, batch=batch, site=site)
    written = {site: _vector(native, batch, site) for site in sites if site.stream not in READ_ONLY}
    for kind, measure in (("write", _answer), ("gradient", _gradient)):
        for site, vector in written.items():
            yield kind, site.short, partial(measure, batch=batch, site=site, vector=vector)
    if not native.spec.encoder:
        site = Site(layers[len(layers) // 2])
        vector = _vector(native, batch, site)
        yield (
            "text",
            f"{new_tokens} tokens, {site.short} edited",
            partial(_text, batch=batch, site=site, vector=vector, new_tokens=new_tokens),
        )


def _read(model: Backend, *, batch: TokenBatch, site: Site) -> Tensor:
    if site.stream not in READ_ONLY:
        return model.run(batch, reads=[site], where=ALL).reads[site]
    pattern = model.run(batch, reads=[site]).reads[site]
    real = batch.mask.to(pattern.device)
    return pattern * real[:, None, :, None] * real[:, None, None, :]


def _answer(model: Backend, *, batch: TokenBatch, site: Site, vector: Tensor) -> Tensor:
    """What a pass ends in under the edit: logits of the last token, or an encoder's last state."""
    edits: EditMap = {site: At(ALL, lambda x, rows: x + vector.to(x))}
    last = Site(-1)
    run = model.run(batch, reads=[last], writes=edits, grad=vector.requires_grad, where=LAST, logits_to_keep=1)
    return run.reads[last] if run.logits is None or model.spec.encoder else run.logits[:, -1]


def _gradient(model: Backend, *, batch: TokenBatch, site: Site, vector: Tensor) -> Tensor:
    moved = vector.clone().requires_grad_()
    answer = _answer(model, batch=batch, site=site, vector=moved).float()
    weights = torch.randn(answer.shape[-1], generator=torch.Generator().manual_seed(1)).to(answer)
    return torch.autograd.grad((answer @ weights).sum(), moved)[0]


def _text(model: Backend, *, batch: TokenBatch, site: Site, vector: Tensor, new_tokens: int) -> Tensor:
    edits: EditMap = {site: At(ALL, lambda x, rows: x + vector.to(x))}
    ids = model.generate(batch, writes=edits, max_new_tokens=new_tokens).ids
    return torch.nn.functional.one_hot(ids, model.spec.d_vocab).float()  # any other token is a difference of 1


def _vector(native: Backend, batch: TokenBatch, site: Site) -> Float[Tensor, " width"]:
    """A random vector half as long as the states it is added to, so that a missed edit cannot hide."""
    states = native.run(batch, reads=[site], where=ALL, stop_after=site).reads[site].float()
    vector = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0)).to(states.device)
    return vector / vector.norm() * states.norm(dim=-1).mean() / 2


def _difference(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    wanted = wanted.detach().float().cpu()
    found = (found.detach().float().cpu() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    return float(found) if bool(found.isfinite()) else float("inf")  # comparisons with nan are never true
