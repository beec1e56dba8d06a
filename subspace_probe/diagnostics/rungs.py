"""One rung of the realisability ladder: prompts under a change of states, embeddings or tokens, and what it did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.edits import NO_EDITS, EditMap
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Metric
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.interventions.targets import HalfSpace
from subspace_probe.linalg.shrinkage import inverse_times, oas
from subspace_probe.models.capturing import Limits, batches
from subspace_probe.models.hooked import HookedModel


@final
@dataclass(frozen=True, eq=False)
class Observed:
    """What a pass over some prompts showed.

    Attributes:
        states: at each site, of one token a prompt, shape [n, width].
        logits: of the last token, shape [n, d_vocab].
    """

    states: Mapping[Site, Float[Tensor, "n width"]]
    logits: Float[Tensor, "n d_vocab"]


def observe(
    model: HookedModel,
    batch: TokenBatch,
    sites: Sequence[Site],
    where: Where,
    edits: EditMap = NO_EDITS,
    *,
    batch_tokens: int = 8192,
) -> Observed:
    """States and last-token logits of every prompt under edits, in the order of the prompts, on the CPU."""
    states: dict[Site, Tensor] = {}
    logits = torch.empty(batch.size, model.spec.d_vocab)
    for rows in batches(batch.lengths.tolist(), Limits(batch_tokens)):
        run = model.run(batch.rows(rows), reads=sites, writes=edits, where=where, logits_to_keep=1)
        if run.logits is None:
            raise RuntimeError("a pass that was not stopped gave no logits")
        logits[rows] = run.logits[:, -1].float().cpu()
        for site, read in run.reads.items():
            states.setdefault(site, torch.empty(batch.size, read.shape[-1]))[rows] = read.float().cpu()
    return Observed(states, logits)


@final
@dataclass(frozen=True, eq=False)
class Clean:
    """How states lie without any change: class means at every site, and the spread at the target's.

    Attributes:
        source, goal: mean states of the class that is rerouted and of the other one, by site, shape [width].
        precision: of states about their own class mean at the target's site, shrunk (OAS), as what multiplies rows.
        usual: squared Mahalanobis distances of held-out states to the nearer class mean, ascending, shape [m].
    """

    source: Mapping[Site, Float[Tensor, " width"]]
    goal: Mapping[Site, Float[Tensor, " width"]]
    site: Site
    covariance: Float[Tensor, "width width"]
    usual: Float[Tensor, " m"]

    @classmethod
    def of(cls, train: Activations, site: Site, label: int, held_out: Float[Tensor, "m width"]) -> "Clean":
        """From clean states of both classes, and others at the target's site to compare distances with.

        Args:
            label: the class that is rerouted.
        """
        labels = train.labels
        states = {each: train.at(each).double() for each in train.sites}
        source = {each: rows[labels == label].mean(0) for each, rows in states.items()}
        goal = {each: rows[labels != label].mean(0) for each, rows in states.items()}
        own = torch.where((labels == label)[:, None], source[site], goal[site])
        centred = states[site] - own
        covariance, _ = oas(centred.T @ centred / len(centred), len(centred))
        clean = cls(source, goal, site, covariance, torch.empty(0, dtype=torch.float64))
        usual = clean.distance(held_out).sort().values
        return cls(source, goal, site, covariance, usual)

    def distance(self, x: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        """Squared Mahalanobis distance to the nearer class mean, at the target's site."""
        from_each: list[Tensor] = []
        for mean in (self.source[self.site], self.goal[self.site]):
            centred = x.double() - mean
            from_each.append((inverse_times(self.covariance, centred) * centred).sum(1))
        return torch.stack(from_each).amin(0)

    def percentile(self, x: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        """The share of clean held-out states that lie no farther out, 0 to 1."""
        return torch.searchsorted(self.usual, self.distance(x), right=True).double() / len(self.usual)

    def score(self, site: Site, x: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        """The coordinate from one class mean to the other: -1 at the rerouted class's, 1 at the other's."""
        gap = self.goal[site] - self.source[site]
        middle = (self.goal[site] + self.source[site]) / 2
        return 2 * (x.double() - middle) @ gap / gap.square().sum().clamp(min=1e-300)

    def cosine(self, site: Site, moved: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        """Between a displacement and the way from one class mean to the other; 0 where nothing moved."""
        gap = self.goal[site] - self.source[site]
        return torch.nn.functional.cosine_similarity(moved.double(), gap[None], dim=1, eps=1e-12)


@final
@dataclass(frozen=True, eq=False)
class Rung:
    """One level under one condition: "rerouted", or a control, drawn once or several times.

    Attributes:
        draws: what was observed, one a draw.
    """

    level: str
    condition: str
    draws: tuple[Observed, ...]

    def met(self, target: HalfSpace, site: Site, *, slack: float = 0.0) -> Bool[Tensor, "draws n"]:
        """Where the score is at the margin or beyond, but for `slack`."""
        return torch.stack([target.score(draw.states[site]) for draw in self.draws]) >= target.margin - slack

    def flipped(self, clean: Observed, metric: Metric, prompts: Sequence[Prompt]) -> Bool[Tensor, "draws n"]:
        """Where the metric has another sign than without the change."""
        before = metric(clean.logits, prompts)
        after = torch.stack([metric(draw.logits, prompts) for draw in self.draws])
        return (after > 0) != (before > 0)
