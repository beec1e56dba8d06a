"""Unlearning in the weights: forget prompts are misdirected at one site, retain prompts are held where they were.

Representation misdirection (RMU, Li et al. 2024, arXiv:2403.03218): some matrices below a site are trained until the
states of forget prompts are a fixed control vector, while those of retain prompts stay what they were. Two things can
be constrained, as in SSPU (Wang et al. 2025, arXiv:2505.24428): where the control vector points, and which directions
of the stream the matrices may write anew.

The published description gives no constants and no code. All constants here are settings, with defaults that work on
small models; losses are in units of the mean squared norm of the forget states, so that they mean the same at any site.
Low accuracy afterwards shows that an answer is no longer given, not that it is gone from the weights.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.errors import ConfigError, DataError, ShapeError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Prefix
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import PROMPT, Where
from subspace_probe.linalg.projections import project
from subspace_probe.models.hooked import HookedModel
from subspace_probe.models.weights import stream_writers

Constraint = Literal["projected", "penalised", "none"]


@final
@dataclass(frozen=True)
class Unlearning:
    """How a model is made to forget.

    Args:
        constraint: "projected" puts what was changed back into the span after every step of the optimiser: Adam's
            step leaves a span that the gradient lies in. "penalised" adds what lies outside to the loss, as published.
        steps: of the optimiser.
        batch: forget prompts a step, and as many retain prompts.
        lr: learning rate of Adam.
        gamma: length of the control vector, in mean norms of the forget states.
        alpha: weight of holding retain states.
        penalty: weight of the squared change outside the span, over the squared size of the weights; "penalised" only.
        layers: blocks that are trained: that of the site, and those right below it.
        where: the tokens whose states are misdirected and held.
        seed: of the order of prompts.
    """

    constraint: Constraint = "projected"
    steps: int = 60
    batch: int = 24
    lr: float = 3e-3
    gamma: float = 1.0
    alpha: float = 4.0
    penalty: float = 1e3
    layers: int = 1
    where: Where = PROMPT
    seed: int = 0

    def __post_init__(self) -> None:
        if self.constraint not in get_args(Constraint):
            known = ", ".join(get_args(Constraint))
            raise ConfigError(f"constraint={self.constraint!r} is not known. Known: {known}.")
        if min(self.steps, self.batch, self.layers) < 1:
            raise ConfigError(
                f"Unlearning was given steps={self.steps}, batch={self.batch}, layers={self.layers}. "
                "They must be 1 or more."
            )
        numbers = (self.lr, self.gamma, self.alpha, self.penalty)
        if not all(math.isfinite(x) and x >= 0 for x in numbers) or self.lr == 0:
            raise ConfigError(f"Unlearning was given lr, gamma, alpha, penalty = {numbers}. Give finite positive ones.")


@final
@dataclass(frozen=True, eq=False)
class Unlearned:
    """A model after unlearning; it shares with the one it came from all weights that were not trained.

    Attributes:
        matrices: the weights that were trained, by name.
        off_span: share of the change that lies outside the span, |(1 - P) d| / |d|, over all matrices; NaN without one.
        change: size of the change relative to the matrices, |d| / |W|.
        history: losses, a row a step: step, forget, retain.
    """

    model: HookedModel
    matrices: tuple[str, ...]
    off_span: float
    change: float
    history: tuple[Mapping[str, float], ...] = field(default=())


def unlearn(
    model: HookedModel,
    forget: Sequence[Prompt],
    retain: Sequence[Prompt],
    site: Site,
    control: Float[Tensor, " d"],
    settings: Unlearning | None = None,
    *,
    span: Float[Tensor, "k d"] | None = None,
    progress: bool = False,
) -> Unlearned:
    """Misdirect forget prompts at a site by training what the blocks below it write to the stream.

    The loss of a step is `|h(f) - c|^2 + alpha |h(r) - h0(r)|^2` over the mean squared norm of the forget states, where
    c is `control` at length gamma times their mean norm, and where asked for the penalty on what leaves the span.
    Passes resume from the state in front of the lowest trained block, and end at the site.

    Args:
        site: a residual stream.
        control: where forget states are sent; its length does not matter.
        span: orthonormal rows, the directions of the stream that may be written anew. Without a constraint it is only
            measured against.

    Raises:
        ConfigError: weights in half precision, in which small steps are lost; a constraint without a span; a family
            whose stream is more than what its weights write.
        DataError: no prompts.
        ShapeError: a control vector or a span of another width, or a control vector of zeros.
    """
    settings = settings or Unlearning()
    site = site.resolve(model.spec.n_layers)
    _check(model, forget, retain, control, span, settings)
    first = max(0, site.layer - settings.layers + 1)
    changed, rows = trainable(model, range(first, site.layer + 1))
    before = {name: row.detach().clone() for name, row in rows.items()}
    size = sum(float(row.double().square().sum()) for row in before.values())
    steps = _Steps.of(model, forget, retain, site, first, settings)
    target = control / control.norm() * settings.gamma * steps.norm
    weights = [changed.backend.hf.base_model.get_parameter(name) for name in rows]
    optimiser = torch.optim.Adam(weights, lr=settings.lr)
    history: list[Mapping[str, float]] = []
    for step in tqdm(range(settings.steps), "unlearn", disable=not progress):
        forgotten, kept, held = steps.at(step)
        away = steps.states(changed, forgotten) - target.to(held)
        drift = steps.states(changed, kept) - held
        losses = [x.square().sum(-1).mean() / steps.norm**2 for x in (away, drift)]
        loss = losses[0] + settings.alpha * losses[1]
        if settings.constraint == "penalised" and span is not None:
            outside = [delta - project(delta, span) for delta in _changes(rows, before)]
            loss = loss + settings.penalty * sum(x.square().sum() for x in outside) / size
        grads = torch.autograd.grad(loss, weights)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        optimiser.step()
        if settings.constraint == "projected" and span is not None:
            with torch.no_grad():
                for name, row in rows.items():
                    row.copy_(before[name] + project(row - before[name], span))
        history.append({"step": step, "forget": float(losses[0]), "retain": float(losses[1])})
    for weight in weights:
        weight.grad = None
        weight.requires_grad_(False)
    deltas = [delta.detach().double() for delta in _changes(rows, before)]
    total = sum(float(delta.square().sum()) for delta in deltas)
    return Unlearned(changed, tuple(rows), off_span(deltas, span), math.sqrt(total / size), tuple(history))


def control_vector(d: int, *, seed: int, span: Float[Tensor, "k d"] | None = None) -> Float[Tensor, " d"]:
    """A random unit vector, inside a span where one is given: uniform on the sphere of the span.

    Raises:
        ShapeError: a span of another width.
    """
    if span is not None and span.shape[1] != d:
        raise ShapeError(f"A control vector of width {d} was asked for in a span of width {span.shape[1]}.")
    drawn = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = drawn if span is None else project(drawn, span.double().cpu())
    return (drawn / drawn.norm()).float()


def off_span(deltas: Sequence[Tensor], span: Float[Tensor, "k d"] | None) -> float:
    """Share of a change that lies outside a span, |(1 - P) d| / |d| over all matrices, in float64.

    Args:
        deltas: changes as rows that are written, each [..., d].

    Returns:
        From 0 to 1; NaN without a span or without a change.
    """
    if span is None:
        return float("nan")
    basis = span.detach().to("cpu", torch.float64)
    pairs = [(delta.detach().to("cpu", torch.float64), basis) for delta in deltas]
    total = sum(float(delta.square().sum()) for delta, _ in pairs)
    outside = sum(float((delta - project(delta, axes)).square().sum()) for delta, axes in pairs)
    return math.sqrt(outside / total) if total > 0 else float("nan")


def trainable(model: HookedModel, layers: range) -> tuple[HookedModel, dict[str, Tensor]]:
    """A copy of a model whose blocks in `layers` can be trained in what they write; all else is shared with it.

    Returns:
        The copy, and its trainable weights by name as rows that are written, views [..., d_model].

    Raises:
        ConfigError: a family whose stream is more than what its weights write, or weights that are not ordinary.
    """
    hf, layout = model.backend.hf, model.backend.layout
    names = [
        name
        for name in stream_writers(hf, layout)
        if any(name.startswith(f"{layout.blocks}.{layer}.") for layer in layers)
    ]
    own = {id(hf.base_model.get_parameter(name)) for name in names}
    copy = deepcopy(hf, {id(weight): weight for weight in hf.parameters() if id(weight) not in own})
    for name in names:
        copy.base_model.get_parameter(name).requires_grad_(True)
    backend = type(model.backend)(copy, name=f"{model.spec.name}, unlearned")
    changed = HookedModel(backend, model.tokenizer, template_kwargs=model.template_kwargs, words=model.words)
    rows = stream_writers(copy, layout)
    return changed, {name: rows[name] for name in names}


@final
@dataclass(frozen=True, eq=False)
class _Steps:
    """What every step needs and no step changes: states in front of the trained blocks, and where retain states were.

    Attributes:
        forget, retain: states to resume from, a batch each.
        held: states of the retain batches at the site before anything was trained, one row a token.
        norm: mean norm of the forget states.
    """

    forget: tuple[Prefix, ...]
    retain: tuple[Prefix, ...]
    held: tuple[Tensor, ...]
    norm: float
    site: Site
    where: Where

    @classmethod
    def of(
        cls,
        model: HookedModel,
        forget: Sequence[Prompt],
        retain: Sequence[Prompt],
        site: Site,
        first: int,
        settings: Unlearning,
    ) -> "_Steps":
        generator = torch.Generator().manual_seed(settings.seed)
        made: list[tuple[Prefix, ...]] = []
        for prompts in (forget, retain):
            order: list[int] = torch.randperm(len(prompts), generator=generator).tolist()
            parts = [order[start : start + settings.batch] for start in range(0, len(order), settings.batch)]
            made.append(tuple(model.prefix(model.tokens([prompts[i] for i in part]), first) for part in parts))
        forgotten, kept = made
        bare = cls(forgotten, kept, (), 1.0, site, settings.where)
        with torch.no_grad():
            held = tuple(bare.states(model, prefix).detach() for prefix in kept)
            norms = torch.cat([bare.states(model, prefix).detach().norm(dim=-1) for prefix in forgotten])
        return cls(forgotten, kept, held, float(norms.double().mean()), site, settings.where)

    def at(self, step: int) -> tuple[Prefix, Prefix, Tensor]:
        """Forget batch, retain batch and the retain batch's former states of a step."""
        which = step % len(self.retain)
        return self.forget[step % len(self.forget)], self.retain[which], self.held[which]

    def states(self, model: HookedModel, prefix: Prefix) -> Float[Tensor, "row d"]:
        """States at the site, one row a token, with their graph where the weights have one."""
        grad = torch.is_grad_enabled()
        run = model.run(
            prefix.batch, reads=[self.site], stop_after=self.site, prefix=prefix, where=self.where, grad=grad
        )
        return run.reads[self.site]


def _changes(rows: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[Tensor]:
    return [row - before[name] for name, row in rows.items()]


def _check(
    model: HookedModel,
    forget: Sequence[Prompt],
    retain: Sequence[Prompt],
    control: Tensor,
    span: Tensor | None,
    settings: Unlearning,
) -> None:
    if model.backend.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"{model.spec.name} is in {model.backend.dtype}, in which small steps are lost. Load it with dtype=float32."
        )
    if model.standing_sites:
        raise ConfigError("The model has standing interventions (intervened), which are not in its weights.")
    if not forget or not retain:
        raise DataError(f"Unlearning was given {len(forget)} forget and {len(retain)} retain prompts. It needs both.")
    if settings.constraint != "none" and span is None:
        raise ConfigError(f"constraint={settings.constraint!r} needs a span. Give one, or constraint='none'.")
    for name, width in (("control", len(control)), *((("span", span.shape[1]),) if span is not None else ())):
        if width != model.spec.d_model:
            raise ShapeError(f"The {name} has width {width}, but the residual stream {model.spec.d_model}.")
    if not 0 < float(control.norm()) < math.inf:
        raise ShapeError("The control vector is zero or not finite. Draw one with control_vector().")
