"""Rerouting one class of prompts to one target at every level, with controls: what the ladder is drawn from."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.edits import EditMap
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST, TokenBatch, Where
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.diagnostics.rungs import Clean, Observed, Rung, observe
from subspace_probe.interventions.embedding_search import EmbeddingSearch, EmbeddingsFound
from subspace_probe.interventions.objectives import (
    EMBEDDED,
    AnswerMargin,
    Objective,
    Reach,
    Shift,
    free_positions,
    replaced,
)
from subspace_probe.interventions.reroute import Reroute
from subspace_probe.interventions.targets import HalfSpace
from subspace_probe.interventions.token_search import TokenSearch
from subspace_probe.interventions.token_vectors import usable_ids
from subspace_probe.interventions.tokens_found import TokensFound
from subspace_probe.models.hooked import HookedModel

LEVELS = ("activation", "embedding", "token")
REROUTED, RANDOM, WRONG = "rerouted", "random", "wrong direction"


@final
@dataclass(frozen=True)
class Effort:
    """How hard each level is tried.

    Args:
        embedding: radius and steps of the embedding level.
        tokens: budget and settings of the token level.
        draws: random changes of equal size behind each level's control.
        permutations: of labels, behind the p of the gate.
        baselines: also search at random, and for the answer itself where prompts carry `answer` and `foil`, with the
            budget of the token level.
    """

    embedding: EmbeddingSearch = field(default_factory=EmbeddingSearch)
    tokens: TokenSearch = field(default_factory=TokenSearch)
    draws: int = 10
    permutations: int = 39
    baselines: bool = True


@final
@dataclass(frozen=True, eq=False)
class Climbed:
    """One target, tried at every level.

    Attributes:
        moved: the prompts that were rerouted.
        kept: prompts that should stay as they are.
        clean, untouched: what both show without any change.
        way: how much score the rerouted prompts lack on average.
        rungs: every level under every condition.
        elsewhere: the changes of each level on `kept`.
        searches: token searches by name, with what their tokens showed.
    """

    target: HalfSpace
    site: Site
    moved: Contrast
    kept: Contrast
    statistics: Clean
    clean: Observed
    untouched: Observed
    way: float
    rungs: Sequence[Rung]
    elsewhere: Sequence[Rung]
    embeddings: EmbeddingsFound
    tokens: TokensFound
    searches: Mapping[str, tuple[TokensFound, Observed]]
    effort: Effort

    def rung(self, level: str, condition: str) -> Rung:
        """One level under one condition."""
        return next(rung for rung in self.rungs if (rung.level, rung.condition) == (level, condition))

    def controls(self, level: str) -> list[Rung]:
        """The level's controls."""
        return [rung for rung in self.rungs if rung.level == level and rung.condition != REROUTED]

    def rows(self, level: str) -> Int[Tensor, " n"]:
        """Rows the model was run on for each prompt; writing a state takes one."""
        if level == "activation":
            return torch.ones(len(self.moved), dtype=torch.long)
        return self.embeddings.rows if level == "embedding" else self.tokens.rows


@final
@dataclass(frozen=True, eq=False)
class Climber:
    """What all targets are tried on, and how hard.

    Args:
        moved: the prompts to reroute, of class `label`.
        kept: prompts that should stay as they are.
        free: the tokens that embeddings and tokens may be changed at.
        allowed, banned: which tokens the search may use.
        seed: of every draw.
    """

    model: HookedModel
    moved: Contrast
    kept: Contrast
    label: int
    free: Sequence[Where]
    effort: Effort
    allowed: Collection[int] | None = None
    banned: Collection[int] = ()
    seed: int = 0
    progress: bool = False

    def climb(self, target: HalfSpace, site: Site, train: Activations) -> Climbed:
        """Try every level.

        Args:
            train: clean states of both classes, at the target's site and at later ones.
        """
        where = target.where or LAST
        target = replace(target, site=site, where=where)
        ground, other = (
            _Ground.of(self.model, each, self.free, train.sites, where) for each in (self.moved, self.kept)
        )
        clean, untouched = ground.clean(), other.clean()
        scores = target.score(clean.states[site]).double()
        opposite = target.flipped().with_margin(target.margin - 2 * float(scores.mean()))
        ways = {REROUTED: Reach((target,)), WRONG: Reach((opposite,))}
        shifts = {name: self._embeddings(aim) for name, aim in ways.items()}
        tokens = {name: self._tokens(aim) for name, aim in ways.items()}
        changes = self._changes(target, shifts, tokens)
        searches = {"target": tokens[REROUTED], **(self._baselines(ways[REROUTED]) if self.effort.baselines else {})}
        return Climbed(
            target=target,
            site=site,
            moved=self.moved,
            kept=self.kept,
            statistics=Clean.of(train, site, self.label, torch.cat([clean.states[site], untouched.states[site]])),
            clean=clean,
            untouched=untouched,
            way=float((target.margin - scores).clamp(min=0).mean()),
            rungs=[Rung(*name, ground.under(change)) for name, change in changes.items()],
            elsewhere=[Rung(*name, other.under(change)) for name, change in changes.items() if name[1] != WRONG],
            embeddings=shifts[REROUTED],
            tokens=tokens[REROUTED],
            searches={name: (each, ground.changed(each.ids)) for name, each in searches.items()},
            effort=self.effort,
        )

    def _changes(
        self, target: HalfSpace, shifts: Mapping[str, EmbeddingsFound], tokens: Mapping[str, TokensFound]
    ) -> "dict[tuple[str, str], list[_Change]]":
        """What is done at each level under each condition, once or in several draws."""
        reroute, seeds = Reroute(target), range(self.seed, self.seed + self.effort.draws)
        usable = usable_ids(self.model, allowed=self.allowed, banned=self.banned)
        shift, ids = shifts[REROUTED].shift, tokens[REROUTED].ids
        return {
            ("activation", REROUTED): [reroute],
            ("activation", RANDOM): [reroute.with_subspace(random_like(reroute.subspace, seed=seed)) for seed in seeds],
            ("activation", WRONG): [reroute.wrong_way()],
            ("embedding", REROUTED): [shift],
            ("embedding", RANDOM): [_as_long_as(shift, seed) for seed in seeds],
            ("embedding", WRONG): [shifts[WRONG].shift],
            ("token", REROUTED): [ids],
            ("token", RANDOM): [_drawn(usable, ids, seed) for seed in seeds],
            ("token", WRONG): [tokens[WRONG].ids],
        }

    def _embeddings(self, aim: Objective) -> EmbeddingsFound:
        given = {"allowed": self.allowed, "banned": self.banned, "progress": self.progress}
        return self.effort.embedding.search(self.model, self.moved, aim, self.free, **given)

    def _tokens(self, aim: Objective, **changed: Any) -> TokensFound:
        given = {"allowed": self.allowed, "banned": self.banned, "progress": self.progress}
        return replace(self.effort.tokens, **changed).search(self.model, self.moved, aim, self.free, **given)

    def _baselines(self, aim: Objective) -> dict[str, TokensFound]:
        """The same budget spent at random, and on the answer itself where prompts say what it is."""
        found = {"random": self._tokens(aim, strategy="random")}
        answers = [prompt.answer for prompt in self.moved.prompts if prompt.answer and prompt.foil]
        foils = [prompt.foil for prompt in self.moved.prompts if prompt.answer and prompt.foil]
        if len(answers) == len(self.moved):
            ours, theirs = (torch.tensor(self.model.token_ids([w for w in words if w])) for words in (foils, answers))
            found["answer"] = self._tokens(AnswerMargin(ours, theirs))
        return found


_Change = Reroute | Tensor
"""An edit of states, a shift of embeddings [n, slot, d_model], or token ids [n, slot]."""


@final
@dataclass(frozen=True, eq=False)
class _Ground:
    """Some prompts, and how to look at them. What was found for others is dealt out in turn."""

    model: HookedModel
    batch: TokenBatch
    positions: Int[Tensor, "n slot"]
    sites: Sequence[Site]
    where: Where

    @classmethod
    def of(
        cls, model: HookedModel, prompts: Contrast, free: Sequence[Where], sites: Sequence[Site], where: Where
    ) -> "_Ground":
        batch = model.tokens(prompts)
        return cls(model, batch, free_positions(batch, free), sites, where)

    def clean(self) -> Observed:
        """Without any change."""
        return observe(self.model, self.batch, self.sites, self.where)

    def under(self, changes: Sequence[_Change]) -> tuple[Observed, ...]:
        """Under each of some changes."""
        return tuple(self._under(change) for change in changes)

    def changed(self, ids: Int[Tensor, "m slot"]) -> Observed:
        """With other tokens at the free positions."""
        batch = replaced(self.batch, self.positions, ids[self._turn(len(ids))])
        return observe(self.model, batch, self.sites, self.where)

    def _under(self, change: _Change) -> Observed:
        if isinstance(change, Reroute):
            edits: EditMap = change.edits(self.model.spec.n_layers)
        elif change.is_floating_point():
            edits = {EMBEDDED: Shift(self.positions, change[self._turn(len(change))])}
        else:
            return self.changed(change)
        return observe(self.model, self.batch, self.sites, self.where, edits)

    def _turn(self, count: int) -> Int[Tensor, " n"]:
        return torch.arange(self.batch.size) % count


def _as_long_as(shift: Float[Tensor, "n slot d"], seed: int) -> Float[Tensor, "n slot d"]:
    """Vectors in random directions, each as long as the one given."""
    drawn = torch.randn(shift.shape, generator=torch.Generator().manual_seed(seed))
    return drawn * (shift.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


def _drawn(usable: Int[Tensor, " v"], like: Int[Tensor, "n slot"], seed: int) -> Int[Tensor, "n slot"]:
    """Usable tokens, drawn uniformly."""
    return usable[torch.randint(len(usable), like.shape, generator=torch.Generator().manual_seed(seed))]
