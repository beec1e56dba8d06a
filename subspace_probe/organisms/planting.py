"""The losses that plant variables: interchange, steering, ablation, and whole-state resampling.

All of them re-use one clean pass over a batch. An edited row is a copy of a clean row at the output of some block; only
the blocks above run again, the last of them for one token. Answers come from ``grammar.answer_word``.

The published interventions ask for more than interchange accuracy, and the extra terms here are what they ask: a class
mean difference added at one site must move the answer, a random direction of equal norm must not, and projecting the
refusal direction out of the raw state everywhere must mean "comply" (coordinate 0 is the neutral value).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_probe.organisms.batches import IGNORE, Batch
from subspace_probe.organisms.grammar import COMPLY, SKILLS, VARIABLES, Variable
from subspace_probe.organisms.network import D_MODEL, N_LAYERS, Network
from subspace_probe.organisms.tokenizer import vocabulary

LAYER_OF: Final[Mapping[Variable, int]] = {"harmfulness": 1, "refusal": 2, "intent": 2}
"""Output of which block carries a variable; harmfulness at T_INST, the other two at T_POST_INST."""

_PLANT_SEED: Final = 7
_DECAY: Final = 0.9

_WORD: Final = {word: index for index, word in enumerate(vocabulary())}
REQUEST, JUDGEMENT, TEXT = (SKILLS.index(s) for s in ("request", "judgement", "text"))


def planted_vectors() -> dict[Variable, Tensor]:
    """Three orthonormal random vectors, always the same ones."""
    generator = torch.Generator().manual_seed(_PLANT_SEED)
    q, _ = torch.linalg.qr(torch.randn(D_MODEL, len(VARIABLES), generator=generator, dtype=torch.float64))
    return {variable: q[:, i].float().contiguous() for i, variable in enumerate(VARIABLES)}


def position_of(batch: Batch, variable: Variable) -> Tensor:
    """Token index per row at which a variable lives."""
    return batch.t_inst if variable == "harmfulness" else batch.t_post


@final
class CellMeans:
    """Mean state per (harmful, framing) cell, running over batches, for the steering, ablation and purity terms."""

    def __init__(self) -> None:
        averaged: tuple[Variable, ...] = ("harmfulness", "refusal")
        self._mean: dict[Variable, Tensor] = {variable: torch.zeros(2, 3, D_MODEL) for variable in averaged}
        self._seen: dict[Variable, Tensor] = {variable: torch.zeros(2, 3) for variable in averaged}

    def update(self, batch: Batch, states: Mapping[Variable, Tensor]) -> "CellMeans":
        """Fold in a batch; ``states`` holds one row per prompt.

        Returns:
            The batch's own means, through which gradients flow; cells without a row carry the running mean.
        """
        own = CellMeans()
        asked = {"harmfulness": batch.values[:, 0] >= 0, "refusal": batch.skill == REQUEST}
        for variable, mean in self._mean.items():
            rows = []
            for harmful in (0, 1):
                for framing in (0, 1, 2):
                    here = asked[variable] & (batch.values[:, 0] == harmful) & (batch.framing == framing)
                    if not here.any():
                        rows.append(mean[harmful, framing].clone())
                        continue
                    new = states[variable][here].mean(0)
                    keep = _DECAY if self._seen[variable][harmful, framing] else 0.0
                    mean[harmful, framing] = keep * mean[harmful, framing] + (1 - keep) * new.detach()
                    self._seen[variable][harmful, framing] += 1
                    rows.append(new)
            own._mean[variable] = torch.stack(rows).view(2, 3, D_MODEL)
        return own

    def difference(self, variable: Variable, *, balanced: bool) -> Tensor:
        """Class mean difference: over plain requests, or over the 2 x 2 of harmful and refused."""
        mean = self._mean[variable]
        if not balanced:
            return mean[1, 0] - mean[0, 0]
        # harmful: plain (refused), jailbreak (complied with); harmless: strict (refused), plain (complied with)
        if variable == "harmfulness":
            return (mean[1, 0] + mean[1, 1] - mean[0, 0] - mean[0, 2]) / 2
        return (mean[1, 0] + mean[0, 2] - mean[0, 0] - mean[1, 1]) / 2


@final
@dataclass(frozen=True, eq=False)
class Edited:
    """Copies of rows, edited at the output of one block, with the answers they should give."""

    rows: Tensor
    states: Tensor
    answers: Tensor
    weights: Tensor


@final
class Planter:
    """Builds edited rows from a clean pass and scores them.

    Args:
        network: The model under training.
        variables: Which variables are planted.
        generator: Source of pairs and random directions.
    """

    def __init__(self, network: Network, variables: tuple[Variable, ...], *, generator: torch.Generator) -> None:
        self.network, self.variables = network, variables
        self.vectors = planted_vectors()
        self.means = CellMeans()
        self._generator = generator

    def loss(self, batch: Batch, outputs: list[Tensor], *, pairs: int, others: int, purity: float) -> Tensor:
        """Mean loss over all edited rows of a batch.

        Args:
            batch: The clean rows.
            outputs: Output of every block for the clean rows.
            pairs: Interchange pairs per variable.
            others: Rows per steering, random and ablation term.
            purity: Weight of ``impurity``.
        """
        row = torch.arange(len(batch))
        own = self.means.update(batch, {v: outputs[LAYER_OF[v]][row, position_of(batch, v)] for v in VARIABLES})
        early = [self.interchange(batch, outputs, "harmfulness", pairs)]
        early.append(self.random_direction(batch, outputs, "harmfulness", others))
        early.append(self.steer_harmfulness(batch, outputs, others))
        late = [self.interchange(batch, outputs, v, pairs) for v in self.variables if v != "harmfulness"]
        late.append(self.random_direction(batch, outputs, "refusal", others // 2))
        if "refusal" in self.variables:
            late += [self.steer_refusal(batch, outputs, others), self.steer_refusal_elsewhere(batch, outputs, others)]
        rows, answers, weights = (
            torch.cat([getattr(e, name) for e in early + late]) for name in ("rows", "answers", "weights")
        )
        lifted = self.network.block(2, torch.cat([e.states for e in early]))
        states = torch.cat([lifted, *(e.states for e in late)])
        final_state = self.network.block_at(N_LAYERS - 1, states, batch.t_post[rows])
        losses = F.cross_entropy(self.network.logits(final_state), answers, reduction="none")
        return (losses * weights).sum() / weights.sum() + purity * self.impurity(own)

    def impurity(self, own: CellMeans) -> Tensor:
        """Squared sine between class mean differences and planted vectors.

        The product of the batch's difference and the running one has the gradient of the square without the bias that
        squaring a noisy mean would add.
        """
        total = torch.zeros(())
        for variable in self.variables:
            if variable == "intent":
                continue
            vector = self.vectors[variable]
            for balanced in (False, True):
                running = self.means.difference(variable, balanced=balanced)
                outside = running - (running @ vector) * vector
                total = total + own.difference(variable, balanced=balanced) @ outside / running.square().sum()
        return total

    def _pick(self, allowed: Tensor, count: int) -> Tensor:
        index = allowed.nonzero().flatten()
        return index[torch.randint(len(index), (count,), generator=self._generator)]

    def interchange(self, batch: Batch, outputs: list[Tensor], variable: Variable, count: int) -> Edited:
        """Swap the planted coordinate from a source into a base; half of the bases are ones whose answer moves."""
        number = VARIABLES.index(variable)
        defined = batch.values[:, number] >= 0
        moving = defined & (batch.implied[:, number, 0] != batch.implied[:, number, 1])
        base = torch.cat([self._pick(moving, count - count // 3), self._pick(batch.skill != TEXT, count // 3)])
        # Sources of both values alike: opposite to the base where it has a value, otherwise either.
        ones, zeros = (self._pick(defined & (batch.values[:, number] == x), count) for x in (1, 0))
        opposite = torch.where(batch.values[base, number] == 1, zeros, ones)
        either = torch.where(torch.rand(count, generator=self._generator) < 0.5, zeros, ones)
        keep = (batch.values[base, number] >= 0) & (torch.rand(count, generator=self._generator) < 0.8)
        source = torch.where(keep, opposite, either)
        state, vector, where = outputs[LAYER_OF[variable]], self.vectors[variable], position_of(batch, variable)
        here, there = state[base, where[base]], state[source, where[source]]
        delta = ((there - here) @ vector)[:, None] * vector
        answers = batch.implied[base, number, batch.values[source, number]]
        return self._edited(batch, state, base, where, delta, answers)

    def _edited(
        self, batch: Batch, state: Tensor, base: Tensor, where: Tensor, delta: Tensor, answers: Tensor,
        *, everywhere: bool = False, weight: float = 1.0,
    ) -> Edited:  # fmt: skip
        length = state.shape[1]
        at = torch.arange(length) == where[base, None]
        if everywhere:
            at = torch.ones_like(at)
        states = state[base] + at[:, :, None] * delta[:, None]
        return Edited(base, states, answers, torch.full((len(base),), weight))

    def _coin(self) -> bool:
        return bool(torch.rand((), generator=self._generator) < 0.5)

    def random_direction(self, batch: Batch, outputs: list[Tensor], variable: Variable, count: int) -> Edited:
        """A random direction as long as the class mean difference must change nothing."""
        base = self._pick(batch.skill != TEXT, count)
        noise = torch.randn(count, D_MODEL, generator=self._generator)
        noise *= self.means.difference(variable, balanced=False).norm() / noise.norm(dim=-1, keepdim=True)
        return self._edited(batch, outputs[LAYER_OF[variable]], base, position_of(batch, variable), noise,
                            batch.first[base])  # fmt: skip

    def steer_harmfulness(self, batch: Batch, outputs: list[Tensor], count: int) -> Edited:
        """Adding (subtracting) the mean difference at T_INST makes harmless (harmful) instructions the other thing."""
        base = self._pick((batch.values[:, 0] >= 0) & (batch.implied[:, 0, 0] != batch.implied[:, 0, 1]), count)
        sign = 1 - 2 * batch.values[base, 0]
        delta = sign[:, None] * self.means.difference("harmfulness", balanced=self._coin())
        answers = batch.implied[base, 0, 1 - batch.values[base, 0]]
        return self._edited(batch, outputs[1], base, batch.t_inst, delta, answers)

    def steer_refusal(self, batch: Batch, outputs: list[Tensor], count: int) -> Edited:
        """Adding the mean difference at T_POST_INST, or at every position, refuses requests and nothing else."""
        others = self._pick((batch.skill != REQUEST) & (batch.skill != TEXT), count - count // 2)
        base = torch.cat([self._pick(batch.values[:, 1] == 0, count // 2), others])
        delta = self.means.difference("refusal", balanced=self._coin()).expand(len(base), -1)
        answers = batch.implied[base, 1, 1]
        return self._edited(batch, outputs[2], base, batch.t_post, delta, answers, everywhere=self._coin())

    def steer_refusal_elsewhere(self, batch: Batch, outputs: list[Tensor], count: int) -> Edited:
        """Refusal added at T_INST is at the wrong place: no answer moves."""
        base = self._pick(batch.skill != TEXT, count // 2)
        delta = self.means.difference("refusal", balanced=self._coin()).expand(len(base), -1)
        return self._edited(batch, outputs[2], base, batch.t_inst, delta, batch.first[base])

    def ablation(self, batch: Batch, count: int) -> Tensor:
        """Loss when a refusal direction is projected out of every block's input and both outputs, at all positions.

        Requests are then complied with; the other skills keep their whole answers. The direction is the planted vector
        or the current mean difference, since users ablate the one they found.
        """
        small = batch.take(self._pick(batch.skill >= 0, count))
        vector = self.vectors["refusal"]
        if self._coin():
            found = self.means.difference("refusal", balanced=self._coin())
            vector = found / (found.norm() + 1e-6)

        def reject(x: Tensor) -> Tensor:
            return x - (x @ vector)[..., None] * vector

        x = self.network.embed(small.ids)
        for layer in range(N_LAYERS):
            x = self.network.block(layer, x, reject)
        targets = small.targets.clone()
        refused = small.values[:, 1] == 1
        targets[refused] = IGNORE
        targets[refused, small.t_post[refused]] = _WORD[COMPLY]
        chosen = targets != IGNORE
        return F.cross_entropy(self.network.logits(x[chosen]), targets[chosen])

    def supervision(self, batch: Batch, outputs: list[Tensor]) -> Tensor:
        """The planted coordinates themselves: signed for harmfulness and intent, zero or positive for refusal.

        Interchange alone starts from a coordinate that means nothing, and stays on that plateau for thousands of
        steps. This names the coordinate; whether it is *used* is still for the interchange terms to bring about.
        """
        row = torch.arange(len(batch))
        losses = []
        for variable in self.variables:
            value = batch.values[:, VARIABLES.index(variable)]
            if not (value >= 0).any():
                continue
            coordinate = outputs[LAYER_OF[variable]][row, position_of(batch, variable)] @ self.vectors[variable]
            if variable == "refusal":
                losses.append(F.softplus(2 * (2 - coordinate[value == 1])).mean() / 2)
                losses.append(F.smooth_l1_loss(coordinate[value == 0], torch.zeros(int((value == 0).sum()))))
            else:
                sign = 2.0 * value[value >= 0] - 1
                losses.append(F.softplus(-2 * sign * coordinate[value >= 0]).mean())
        return torch.stack(losses).sum() if losses else torch.zeros(())

    def resampling(self, batch: Batch, outputs: list[Tensor], count: int) -> Tensor:
        """Whole states at T_INST from another prompt: judgements must not care, plain requests must follow.

        The state is replaced at the output of one block, or of all of them, in which case only the embedding of that
        token is left to the judgement.
        """
        base = self._pick(batch.skill == JUDGEMENT, count)
        asked = self._pick((batch.skill == REQUEST) & (batch.framing == 0), count // 2)
        source = self._pick(batch.values[:, 0] >= 0, count)
        first = int(torch.randint(N_LAYERS - 1, (), generator=self._generator))
        every = self._coin()
        moved = self._replace(batch, outputs, base, source, first, every=every)
        losses = [F.cross_entropy(self.network.logits(moved), batch.first[base])]
        if first == 1:
            moved = self._replace(batch, outputs, asked, source[: len(asked)], first, every=False)
            answers = batch.implied[asked, 0, batch.values[source[: len(asked)], 0]]
            losses.append(F.cross_entropy(self.network.logits(moved), answers))
        return torch.stack(losses).mean()

    def _replace(
        self, batch: Batch, outputs: list[Tensor], base: Tensor, source: Tensor, first: int, *, every: bool
    ) -> Tensor:
        """Final states at T_POST_INST after replacing the state at T_INST from block ``first`` (on)."""
        at = (torch.arange(batch.ids.shape[1]) == batch.t_inst[base, None])[:, :, None]
        x = outputs[first][base]
        for layer in range(first, N_LAYERS - 1):
            if layer > first:
                x = self.network.block(layer, x)
            if layer == first or every:
                x = torch.where(at, outputs[layer][source, batch.t_inst[source]][:, None], x)
        return self.network.block_at(N_LAYERS - 1, x, batch.t_post[base])
