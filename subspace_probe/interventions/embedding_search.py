"""Embedding level: small changes of the free positions' states in front of the first block that reach a target.

Between the activation level, where any state can be written, and the token level, where only tokens can: what a
continuous input could do. Projected gradient descent (Madry et al. 2018, https://arxiv.org/abs/1706.06083) with a
radius in units of the distance between tokens, so that it means the same in every model.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.edits import EditMap
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.tokens import Where
from subspace_probe.interventions.objectives import EMBEDDED, Evaluation, Objective, Shift
from subspace_probe.interventions.token_vectors import neighbour_distance, token_vectors, usable_ids
from subspace_probe.models.hooked import HookedModel, PromptsLike


@final
@dataclass(frozen=True, eq=False)
class EmbeddingsFound:
    """What an embedding search found, a row a prompt.

    Attributes:
        shift: added to the states of the free positions where the first block begins, shape [n, slot, d_model].
        positions: those positions, absolute, shape [n, slot].
        loss: with the shift, shape [n]; 0 where every target is met.
        initial: without it, shape [n].
        unit: the median distance of a token to its nearest neighbour.
        radius: the longest a shift may be, in activation units.
        nearest: the token nearest to each shifted state, shape [n, slot].
        distance: how far that token is, in units of `unit`, shape [n, slot].
        rows: rows the model was run on, each with a gradient, shape [n].
        layer_forwards: blocks that rows went through in all; a gradient counts as three passes.
    """

    shift: Float[Tensor, "n slot d_model"]
    positions: Int[Tensor, "n slot"]
    loss: Float[Tensor, " n"]
    initial: Float[Tensor, " n"]
    unit: float
    radius: float
    nearest: Int[Tensor, "n slot"]
    distance: Float[Tensor, "n slot"]
    rows: Int[Tensor, " n"]
    layer_forwards: int

    @property
    def met(self) -> Bool[Tensor, " n"]:
        """Where the loss is 0."""
        return self.loss <= 0

    def edits(self) -> EditMap:
        """The shift as an edit, for prompts in the order they were searched in."""
        return {EMBEDDED: Shift(self.positions, self.shift)}


@final
@dataclass(frozen=True)
class EmbeddingSearch:
    """Projected gradient descent on the states of the free positions, many prompts side by side.

    Args:
        radius: the longest shift of one position, in median distances between neighbouring tokens. At 0.5 and below
            most shifted states are still nearest to the token they came from.
        steps: of the descent, at most; a prompt that is there stops.
        rate: length of the first step as a share of the radius; it falls linearly to a tenth of that.
        batch_tokens: how many tokens one pass may have.
    """

    radius: float = 1.0
    steps: int = 40
    rate: float = 0.4
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        if not (0 < self.radius < float("inf") and self.rate > 0 and self.steps >= 1 and self.batch_tokens >= 1):
            raise ConfigError(
                f"An embedding search was given radius={self.radius}, steps={self.steps}, rate={self.rate}. Radius and "
                "rate are above 0 and finite, and there is at least one step."
            )

    def search(
        self,
        model: HookedModel,
        prompts: PromptsLike,
        objective: Objective,
        free: Sequence[Where],
        *,
        allowed: Collection[int] | None = None,
        banned: Collection[int] = (),
        progress: bool = False,
    ) -> EmbeddingsFound:
        """Search, for each prompt by itself, until its loss is 0 or its steps are used up.

        Args:
            objective: what is wanted: `Reach(targets)`, or `AnswerMargin` for the answer itself.
            free: which positions may be shifted, as many in every prompt.
            allowed, banned: which tokens distances are measured to; special ones are left out.

        Raises:
            PositionError: free positions that differ in number, or a target before all of them.
            ConfigError: fewer than two tokens to measure distances by.
        """
        evaluation = Evaluation(model, model.tokens(prompts), objective, free, batch_tokens=self.batch_tokens)
        tokens = _Tokens(model, usable_ids(model, allowed=allowed, banned=banned))
        unit = neighbour_distance(tokens.at(int(evaluation.positions[0, 0])))
        radius = self.radius * unit
        shift, loss, initial = self._descend(evaluation, radius, progress=progress)
        given = evaluation.given()
        nearest, distance = torch.zeros_like(given), torch.zeros(given.shape)
        for row, (positions, ids) in enumerate(zip(evaluation.positions.tolist(), given.tolist(), strict=True)):
            for slot, (position, token) in enumerate(zip(positions, ids, strict=True)):
                state = tokens.of(token, position) + shift[row, slot]
                nearest[row, slot], distance[row, slot] = tokens.nearest(state, position)
        return EmbeddingsFound(
            shift=shift,
            positions=evaluation.positions,
            loss=loss,
            initial=initial,
            unit=unit,
            radius=radius,
            nearest=nearest,
            distance=distance / unit,
            rows=evaluation.rows,
            layer_forwards=evaluation.layer_forwards,
        )

    def _descend(self, evaluation: Evaluation, radius: float, *, progress: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The best shift of every prompt, its loss, and the loss without one."""
        given = evaluation.given()
        shape = (*given.shape, evaluation.model.spec.d_model)
        current, best = torch.zeros(shape), torch.zeros(shape)
        lowest, initial = torch.full((len(given),), float("inf")), torch.zeros(len(given))
        for step in tqdm(range(self.steps + 1), desc="embeddings", disable=not progress, leave=False):
            rows = (lowest > 0).nonzero().flatten()
            if not len(rows):
                break
            chosen: list[int] = rows.tolist()
            loss, gradient = evaluation.gradients_of(chosen, given[rows], current[rows])
            initial = loss.float() if step == 0 else initial
            better = loss < lowest[rows]
            best[rows[better]], lowest[rows[better]] = current[rows[better]], loss[better].float()
            length = self.rate * radius * (1 - 0.9 * step / self.steps)
            current[rows] = _within(current[rows] - length * _unit(gradient), radius)
        return best, lowest, initial


def _unit(x: Float[Tensor, "n slot d"]) -> Float[Tensor, "n slot d"]:
    """Each vector at length one; one that is zero stays so."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _within(x: Float[Tensor, "n slot d"], radius: float) -> Float[Tensor, "n slot d"]:
    """Each vector, shortened to the radius where it is longer."""
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length > radius, x * (radius / length.clamp(min=torch.finfo(x.dtype).tiny)), x)


@final
class _Tokens:
    """The states of all usable tokens, by position where that matters."""

    def __init__(self, model: HookedModel, usable: Int[Tensor, " v"]) -> None:
        self.model, self.usable = model, usable
        self._kept: dict[int, Tensor] = {}

    def at(self, position: int) -> Tensor:
        """The states of the usable tokens, shape [v, d_model]."""
        key = position if self.model.spec.learned_positions else 0
        if key not in self._kept:
            self._kept[key] = token_vectors(self.model, self.usable, position=key).float()
        return self._kept[key]

    def of(self, token: int, position: int) -> Tensor:
        """The state of one token, usable or not."""
        return token_vectors(self.model, torch.tensor([token]), position=position)[0].float()

    def nearest(self, state: Tensor, position: int) -> tuple[int, float]:
        """The nearest usable token, and how far it is."""
        distances = (self.at(position) - state).norm(dim=1)
        index = int(distances.argmin())
        return int(self.usable[index]), float(distances[index])
