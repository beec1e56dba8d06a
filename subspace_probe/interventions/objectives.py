"""What a search over inputs makes small, and the passes it takes to know: each one is counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.edits import NO_EDITS, EditContext, EditMap
from subspace_probe.core.errors import ConfigError, PositionError, SiteError
from subspace_probe.core.protocols import Part, Run
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST, TokenBatch, Where
from subspace_probe.interventions.targets import HalfSpace
from subspace_probe.models.hooked import HookedModel

EMBEDDED = Site(0, "resid_pre")
"""Where tokens have become states and nothing else has happened yet."""


@runtime_checkable
class Objective(Protocol):
    """A loss of every row of a pass: 0 where what is wanted is reached, and never saturated where it is not."""

    @property
    def wheres(self) -> tuple[Where, ...]: ...
    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]: ...
    def reads(self, n_layers: int) -> tuple[Site, ...]: ...
    def loss(self, run: Run, batch: TokenBatch, n_layers: int) -> Float[Tensor, " rows"]: ...


@final
@dataclass(frozen=True, eq=False)
class Reach:
    """States in half-spaces: sum_k weight_k max(0, margin_k - score_k), one or several of them.

    Passes end at the deepest target, which is what makes it cheaper than looking at the answer.

    Args:
        targets: each with its site and a one-token `where`.
        weights: one a target; all 1 by default. Scores are in each target's own units.

    Raises:
        ConfigError: no target, another number of weights, one that is not positive, or a `where` of many tokens.
        SiteError: a target without a site.
    """

    targets: tuple[HalfSpace, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        weights = self.weights or (1.0,) * len(self.targets)
        if not self.targets or len(weights) != len(self.targets) or not all(0 < w < float("inf") for w in weights):
            raise ConfigError(
                f"{len(self.targets)} targets and weights {self.weights} were given. Give at least one target, and one "
                "positive weight each, or none."
            )
        object.__setattr__(self, "weights", weights)
        for target in self.targets:
            if target.site is None:
                raise SiteError(f"{target!r} does not say at which site it is to be reached. Give it a site.")
            if not (target.where or LAST).single:
                raise ConfigError(f"{target!r} is at many tokens. A target is reached at one token: give it last, say.")

    @property
    def wheres(self) -> tuple[Where, ...]:
        """The tokens that are looked at."""
        return tuple(target.where or LAST for target in self.targets)

    def reads(self, n_layers: int) -> tuple[Site, ...]:
        """The targets' sites."""
        return tuple(target.site.resolve(n_layers) for target in self.targets if target.site is not None)

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """The targets, at their sites."""
        return list(zip(self.reads(n_layers), self.targets, strict=True))

    def scores(self, run: Run, batch: TokenBatch, n_layers: int) -> Float[Tensor, "target rows"]:
        """The score of every row at every target."""
        rows = torch.arange(batch.size)
        found: list[Tensor] = []
        for target, site, where in zip(self.targets, self.reads(n_layers), self.wheres, strict=True):
            states = run.reads[site]
            columns = batch.position(where) - batch.lengths  # left padded: counted from the end
            found.append(target.score(states[rows.to(states.device), columns.to(states.device)]))
        return torch.stack([score.to(found[0].device) for score in found])

    def loss(self, run: Run, batch: TokenBatch, n_layers: int) -> Float[Tensor, " rows"]:
        """The weighted sum of what is missing."""
        scores = self.scores(run, batch, n_layers)
        missing = [
            weight * (target.margin - score).clamp(min=0)
            for target, weight, score in zip(self.targets, self.weights, scores, strict=True)
        ]
        return torch.stack(missing).sum(0)


@final
@dataclass(frozen=True, eq=False)
class AnswerMargin:
    """The answer instead of states: max(0, margin - (logit of the answer - logit of the foil)), at full depth.

    What a search without an idea of the inside would aim at; the baseline of `Reach`.

    Args:
        answer, foil: tokens, one a prompt of the call, shape [n].
        margin: of the logits.
    """

    answer: Int[Tensor, " n"]
    foil: Int[Tensor, " n"]
    margin: float = 1.0

    @property
    def wheres(self) -> tuple[Where, ...]:
        """The last token, which answers."""
        return (LAST,)

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """Nothing that was found in a model."""
        return ()

    def reads(self, n_layers: int) -> tuple[Site, ...]:
        """Nothing but logits."""
        return ()

    def loss(self, run: Run, batch: TokenBatch, n_layers: int) -> Float[Tensor, " rows"]:
        """What is missing between the two logits.

        Raises:
            ConfigError: a model without next-token logits.
        """
        if run.logits is None:
            raise ConfigError("The model gives no logits, so no answer can be aimed at. Load a decoder.")
        last = run.logits[:, -1].float()
        prompt, rows = batch.index.to(last.device), torch.arange(len(last), device=last.device)
        gained = last[rows, self.answer.to(last.device)[prompt]] - last[rows, self.foil.to(last.device)[prompt]]
        return (self.margin - gained).clamp(min=0)


@final
@dataclass(frozen=True, eq=False)
class Shift:
    """An edit that adds to the states of some positions, each prompt's own.

    Args:
        positions: absolute positions, shape [prompts, slot].
        shift: what is added there, shape [prompts, slot, d].
    """

    positions: Int[Tensor, "prompts slot"]
    shift: Float[Tensor, "prompts slot d"]

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        prompt = ctx.batch.index
        positions = self.positions.to(x.device)[prompt]
        here = (ctx.positions[:, :, None] == positions[:, None, :]) & ctx.real[:, :, None]
        return x + here.to(x) @ self.shift.to(x)[prompt]


def free_positions(batch: TokenBatch, free: Sequence[Where]) -> Int[Tensor, "n slot"]:
    """The absolute positions that a search may change, in order; as many in every prompt.

    Raises:
        ConfigError: none were named.
        PositionError: a prompt has none, or another number than the first one.
    """
    if not free:
        raise ConfigError("No free positions were given. Name at least one, for instance at(3) or last-1.")
    chosen = torch.zeros_like(batch.mask)
    for where in free:
        chosen = chosen | (batch.select(where, batch.positions) & batch.mask)
    counts = chosen.sum(1)
    wrong = ((counts != counts[0]) | (counts == 0)).nonzero().flatten().tolist()
    if wrong:
        named = ", ".join(map(str, free))
        raise PositionError(
            f"Prompt {wrong[0]} has {int(counts[wrong[0]])} tokens at {named}, and prompt 0 has {int(counts[0])}. A "
            f"search needs as many free positions in every prompt, and at least one. It is: {batch.texts[wrong[0]]!r}"
        )
    return batch.positions[chosen].reshape(batch.size, -1)


def replaced(batch: TokenBatch, positions: Int[Tensor, "n slot"], ids: Int[Tensor, "n slot"]) -> TokenBatch:
    """The batch with other tokens at some absolute positions."""
    columns = positions - batch.lengths[:, None] + batch.ids.shape[1]
    return replace(batch, ids=batch.ids.scatter(1, columns, ids.to(batch.ids)))


@final
class Evaluation:
    """A loss on some prompts with their free positions changed, and the count of what it took.

    Attributes:
        positions: free absolute positions, shape [n, slot].
        rows: rows the model was run on for each prompt, forward or with a gradient, shape [n].
        gradients: how many of them were differentiated as well, shape [n].
        depth: blocks that one row passes through.
    """

    def __init__(
        self,
        model: HookedModel,
        batch: TokenBatch,
        objective: Objective,
        free: Sequence[Where],
        *,
        batch_tokens: int,
    ) -> None:
        n_layers = model.spec.n_layers
        for site, part in objective.parts(n_layers):
            if part.fingerprint is not None:
                part.require_model(model.fingerprint)
            part.require_width(model.backend.width(site), site)
        self.model, self.batch, self.objective, self.batch_tokens = model, batch, objective, batch_tokens
        self.positions = free_positions(batch, free)
        sites = sorted(objective.reads(n_layers), key=lambda site: site.order)
        self.stop = sites[-1] if sites else None
        below = self.stop is not None and self.stop.stream == "resid_pre"
        self.depth = n_layers if self.stop is None else self.stop.layer + (0 if below else 1)
        self.rows, self.gradients = (torch.zeros(batch.size, dtype=torch.long) for _ in range(2))
        self._require_seen()

    @property
    def layer_forwards(self) -> int:
        """Blocks that rows went through; a gradient counts as three passes, one forward and about two back."""
        return self.depth * int(self.rows.sum() + 2 * self.gradients.sum())

    def given(self) -> Int[Tensor, "n slot"]:
        """The tokens at the free positions as they came."""
        columns = self.positions - self.batch.lengths[:, None] + self.batch.ids.shape[1]
        return self.batch.ids.gather(1, columns)

    def of_ids(self, prompt: Sequence[int], ids: Int[Tensor, "rows slot"]) -> Float[Tensor, " rows"]:
        """The loss of each row: a prompt's number, and the tokens at its free positions."""
        found: list[Tensor] = []
        for part in self._parts(len(prompt)):
            batch = self._changed(prompt[part], ids[part])
            found.append(self._loss(batch, NO_EDITS, grad=False))
            self._count(batch, differentiated=False)
        return torch.cat(found)

    def gradients_of(
        self, prompt: Sequence[int], ids: Int[Tensor, "rows slot"], shift: Float[Tensor, "rows slot d"] | None = None
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows slot d"]]:
        """The loss of each row, and its gradient by the states of its free positions where the first block begins.

        Args:
            prompt: each at most once.
            shift: added to those states first.
        """
        width, backend = self.model.spec.d_model, self.model.backend
        work = torch.promote_types(backend.dtype, torch.float32)
        losses: list[Tensor] = []
        found: list[Tensor] = []
        for part in self._parts(len(prompt)):
            batch = self._changed(prompt[part], ids[part])
            own = torch.zeros(self.batch.size, ids.shape[1], width, dtype=work, device=backend.device)
            if shift is not None:
                own[batch.index] = shift[part].to(own)
            own.requires_grad_()
            loss = self._loss(batch, {EMBEDDED: Shift(self.positions, own)}, grad=True)
            self._count(batch, differentiated=True)
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss.sum(), own)
            else:
                gradient = torch.zeros_like(own)  # nothing that is read depends on these positions
            losses.append(loss.detach())
            found.append(gradient[batch.index].cpu())
        return torch.cat(losses), torch.cat(found)

    def _loss(self, batch: TokenBatch, writes: EditMap, *, grad: bool) -> Tensor:
        n_layers = self.model.spec.n_layers
        reads = self.objective.reads(n_layers)
        run = self.model.run(batch, reads=reads, writes=writes, grad=grad, stop_after=self.stop, logits_to_keep=1)
        with torch.set_grad_enabled(grad):
            return self.objective.loss(run, batch, n_layers).cpu()

    def _changed(self, prompt: Sequence[int], ids: Tensor) -> TokenBatch:
        rows = list(prompt)
        return replaced(self.batch.rows(rows), self.positions[rows], ids)

    def _count(self, batch: TokenBatch, *, differentiated: bool) -> None:
        ones = torch.ones(batch.size, dtype=torch.long)
        self.rows.index_add_(0, batch.index.cpu(), ones)
        if differentiated:
            self.gradients.index_add_(0, batch.index.cpu(), ones)

    def _parts(self, n: int) -> list[slice]:
        size = max(1, self.batch_tokens // self.batch.ids.shape[1])
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def _require_seen(self) -> None:
        """What is looked at must come after what is changed; an encoder sees both ways."""
        first = self.positions.min(1).values
        for where in () if self.model.spec.encoder else self.objective.wheres:
            early = (self.batch.position(where) < first).nonzero().flatten().tolist()
            if early:
                raise PositionError(
                    f"In prompt {early[0]} the target is at {where}, before every free position, so nothing that is "
                    "changed could reach it. Free earlier tokens, or take a later target."
                )
