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
from dataclasses import dataclass
from typing import Literal, final, get_args

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
        steps: of the optimiser.
        batch: forget prompts a step, and as many retain prompts.
        lr: learning rate of Adam.
        gamma: length of the control vector, in mean norms of the forget states.
        alpha: weight of holding retain states.
        penalty: weight of the squared change outside the span, over the squared size of the weights; "penalised" only.
        layers: blocks that are trained: that of the site, and those right below it.
        where: the tokens whose states are misdirected and held.
        seed: which prompts share a batch.
    """

    steps: int = 60
    batch: int = 24
    lr: float = 1e-2
    gamma: float = 5.0
    alpha: float = 2.0
    penalty: float = 10.0
    layers: int = 1
    where: Where = PROMPT
    seed: int = 0

    def __post_init__(self) -> None:
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
    history: tuple[Mapping[str, float], ...]


@final
@dataclass(frozen=True, eq=False)
class Misdirection:
    """Forget and retain prompts of one model and site, made ready once to unlearn with several arms; see `prepare`.

    Attributes:
        steps: states in front of the lowest trained block to resume from, forget prompts first, a batch each.
        before: states at the site before anything was trained, one row a token, and how many of them are to be
            forgotten, a pair for each batch.
        norm: mean norm of the forget states.
    """

    model: HookedModel
    site: Site
    settings: Unlearning
    steps: tuple[Prefix, ...]
    before: tuple[tuple[Tensor, int], ...]
    norm: float

    def unlearn(
        self,
        control: Float[Tensor, " d"],
        *,
        span: Float[Tensor, "k d"] | None = None,
        constraint: Constraint = "projected",
        seed: int = 0,
        progress: bool = False,
    ) -> Unlearned:
        """Train a copy of the model until forget prompts are misdirected.

        The loss of a step is `|h(f) - c|^2 + alpha |h(r) - h0(r)|^2`, means over tokens, over the mean squared norm of
        the forget states; c is `control` at length gamma times their mean norm.

        Args:
            control: where forget states are sent; its length does not matter.
            span: orthonormal rows, the directions of the stream that may be written anew. Without a constraint it is
                only measured against.
            constraint: "projected" puts what was changed back into the span after every step of the optimiser: Adam's
                step leaves a span that the gradient lies in. "penalised" adds what lies outside to the loss, as
                published; "none" leaves the matrices free.
            seed: of the order of the batches.

        Raises:
            ConfigError: an unknown constraint, or one without a span.
            ShapeError: a control vector or a span of another width, or a control vector of zeros.
        """
        _check_vectors(self.model, control, span, constraint)
        layers = range(max(0, self.site.layer - self.settings.layers + 1), self.site.layer + 1)
        changed, rows = trainable(self.model, layers)
        before = {name: row.detach().clone() for name, row in rows.items()}
        size = sum(float(row.double().square().sum()) for row in before.values())
        target = (control / control.norm() * self.settings.gamma * self.norm).to(self.before[0][0])
        weights = [changed.backend.hf.base_model.get_parameter(name) for name in rows]
        optimiser = torch.optim.Adam(weights, lr=self.settings.lr)
        history: list[Mapping[str, float]] = []
        for step, index in enumerate(tqdm(self._order(seed), "unlearn", disable=not progress)):
            held, n = self.before[index]
            states = _states(changed, self.steps[index], self.site, self.settings.where, grad=True)
            away, drift = (
                moved.square().sum(-1).mean() / self.norm**2 for moved in (states[:n] - target, states[n:] - held[n:])
            )
            loss = away + self.settings.alpha * drift
            if constraint == "penalised" and span is not None:
                outside = [delta - project(delta, span) for delta in _changes(rows, before)]
                loss = loss + self.settings.penalty * sum((x.square().sum() for x in outside), away * 0) / size
            for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = grad
            optimiser.step()
            if constraint == "projected" and span is not None:
                with torch.no_grad():
                    for name, row in rows.items():
                        row.copy_(before[name] + project(row - before[name], span))
            history.append({"step": float(step), "forget": float(away.detach()), "retain": float(drift.detach())})
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)
        deltas = [delta.detach() for delta in _changes(rows, before)]
        total = sum(float(delta.double().square().sum()) for delta in deltas)
        return Unlearned(changed, tuple(rows), off_span(deltas, span), math.sqrt(total / size), tuple(history))

    def _order(self, seed: int) -> list[int]:
        """The batch of every step: all of them once, in random order, and again."""
        generator, n = torch.Generator().manual_seed(seed), len(self.steps)
        rounds = range(-(-self.settings.steps // n))
        return [int(i) for _ in rounds for i in torch.randperm(n, generator=generator)][: self.settings.steps]


def prepare(
    model: HookedModel, forget: Sequence[Prompt], retain: Sequence[Prompt], site: Site, settings: Unlearning
) -> Misdirection:
    """Run both sets of prompts once up to the lowest block that will be trained.

    Args:
        site: a residual stream; passes end there.

    Raises:
        ConfigError: weights in half precision, in which small steps are lost, or standing interventions.
        DataError: no prompts.
        PositionError: a prompt without the tokens that `settings.where` means.
    """
    if model.backend.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"{model.spec.name} is in {model.backend.dtype}, in which small steps are lost. Load it with dtype=float32."
        )
    if model.standing_sites:
        raise ConfigError("The model has standing interventions (intervened), which are not in its weights.")
    if not forget or not retain:
        raise DataError(f"Unlearning was given {len(forget)} forget and {len(retain)} retain prompts. It needs both.")
    site = site.resolve(model.spec.n_layers)
    first = max(0, site.layer - settings.layers + 1)
    generator = torch.Generator().manual_seed(settings.seed)
    parts: list[list[list[Prompt]]] = []
    for prompts in (forget, retain):
        order: list[int] = torch.randperm(len(prompts), generator=generator).tolist()
        starts = range(0, len(order), settings.batch)
        parts.append([[prompts[i] for i in order[start : start + settings.batch]] for start in starts])
    steps: list[Prefix] = []
    before: list[tuple[Tensor, int]] = []
    norms: list[Tensor] = []
    for index in range(max(map(len, parts))):
        some, others = (part[index % len(part)] for part in parts)
        batch = model.tokens([*some, *others])
        meant = batch.select(settings.where, batch.positions) & batch.mask
        # earlier tokens are only read by the block's attention, which is not trained; by that of a block above a
        # trained one they are read as training left them
        column = int(meant.any(0).nonzero()[0]) if first == site.layer and bool(meant.any()) else 0
        prefix = model.prefix(batch, first, column=column)
        states, n = _states(model, prefix, site, settings.where, grad=False), int(meant[: len(some)].sum())
        steps.append(prefix)
        before.append((states, n))
        norms.append(states[:n].norm(dim=-1))
    return Misdirection(model, site, settings, tuple(steps), tuple(before), float(torch.cat(norms).double().mean()))


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


def _states(model: HookedModel, prefix: Prefix, site: Site, where: Where, *, grad: bool) -> Float[Tensor, "row d"]:
    """States at the site, one row a token, with their graph where it is wanted."""
    run = model.run(prefix.batch, reads=[site], stop_after=site, prefix=prefix, where=where, grad=grad)
    return run.reads[site]


def _changes(rows: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[Tensor]:
    return [row - before[name] for name, row in rows.items()]


def _check_vectors(model: HookedModel, control: Tensor, span: Tensor | None, constraint: str) -> None:
    if constraint not in get_args(Constraint):
        raise ConfigError(f"constraint={constraint!r} is not known. Known: {', '.join(get_args(Constraint))}.")
    if constraint != "none" and span is None:
        raise ConfigError(f"constraint={constraint!r} needs a span. Give one, or constraint='none'.")
    for name, width in (("control", len(control)), *((("span", span.shape[1]),) if span is not None else ())):
        if width != model.spec.d_model:
            raise ShapeError(f"The {name} has width {width}, but the residual stream {model.spec.d_model}.")
    if not 0 < float(control.norm()) < math.inf:
        raise ShapeError("The control vector is zero or not finite. Draw one with control_vector().")
