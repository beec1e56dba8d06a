"""Token level: ids for the free positions of a prompt that take its states where they are wanted.

A robustness evaluation of one's own guard or organism: token ids in, token ids out. After Winninger et al. 2025
(subspace rerouting, https://arxiv.org/abs/2503.06269) and greedy coordinate gradients (Zou et al. 2023,
https://arxiv.org/abs/2307.15043), with these differences: a hinge on scores, which does not saturate as a probe's
cross-entropy does; nothing is evaluated twice; special tokens are never used; the whole sequence must survive being
written and read again; budgets are rows that the model was run on, not steps.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.tokens import Where
from subspace_probe.interventions.objectives import Evaluation, Objective
from subspace_probe.interventions.token_vectors import require_survivors, survive, token_vectors, usable_ids
from subspace_probe.interventions.tokens_found import Ids, Progress, TokensFound
from subspace_probe.models.hooked import HookedModel, PromptsLike

_LISTED = 20_000
"""Spaces up to this size are listed once random draws give nothing new."""


def n_replaced(slots: int, loss: float, initial: float, rho: float) -> int:
    """How many tokens a candidate changes: max(1, floor(slots (loss / initial)^(1 / rho))); fewer as the loss falls."""
    share = 1.0 if initial <= 0 else min(1.0, max(0.0, loss / initial))
    return max(1, math.floor(slots * share ** (1 / rho)))


@final
@dataclass(frozen=True)
class TokenSearch:
    """Gradient-guided search over token ids, many prompts side by side.

    From the best candidate so far, its gradient ranks the tokens of every free position by how much each would lower
    the loss to first order; `width` candidates change a few positions to tokens among the best `top_k`, and the best
    one is where the next step starts. After `patience` steps without progress the search goes on from the best
    candidate it has not started from yet, and from random ones where there is none.

    Args:
        budget: rows the model may be run on for each prompt, those with gradients included.
        width: candidates a step. Small ones take more gradients for the same budget.
        top_k: best tokens of each position that candidates draw from; doubled while these are used up.
        buffer: best candidates that are kept, and random ones to begin with.
        rho: how fast the number of tokens changed at once falls with the loss; see `n_replaced`.
        patience: steps without progress before the search goes elsewhere.
        strategy: "random" draws ids uniformly and uses no gradient: the baseline.
        round_trip: only ids whose complete sequence, written as a text and read again, is the same. Switch it off only
            where ids are all that matters.
        seed: of every draw; each prompt has its own.
        batch_tokens: how many tokens one pass may have.
    """

    budget: int = 1000
    width: int = 32
    top_k: int = 32
    buffer: int = 8
    rho: float = 1.8
    patience: int = 4
    strategy: Literal["gradient", "random"] = "gradient"
    round_trip: bool = True
    seed: int = 0
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        wrong = {
            name: value
            for name in ("budget", "width", "top_k", "buffer", "patience", "batch_tokens")
            if (value := getattr(self, name)) < 1
        }
        if wrong or not self.rho > 0 or self.strategy not in ("gradient", "random"):
            raise ConfigError(
                f"A token search was given {wrong or {'rho': self.rho, 'strategy': self.strategy}}. Numbers are at "
                "least 1, rho is above 0, and the strategy is 'gradient' or 'random'."
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
    ) -> TokensFound:
        """Search, for each prompt by itself, until its loss is 0 or its budget is used up.

        Args:
            objective: what is wanted: `Reach(targets)`, or `AnswerMargin` for the answer itself.
            free: which tokens may be changed, as many in every prompt.
            allowed: the only tokens that may be used; by default all of the vocabulary but special ones.
            banned: tokens that may not be used; special ones never are.

        Raises:
            PositionError: free positions that differ in number, or a target before all of them.
            ConfigError: no tokens to search over; prompts that do not survive being written and read again.
        """
        usable = usable_ids(model, allowed=allowed, banned=banned)
        evaluation = Evaluation(model, model.tokens(prompts), objective, free, batch_tokens=self.batch_tokens)
        texts = _Texts(model, evaluation) if self.round_trip else None
        climbs = _begun(self, evaluation, usable)
        vectors: dict[int, Tensor] = {}
        bar: Callable[..., Any] = tqdm
        with bar(
            total=self.budget * len(climbs), desc="tokens", unit="row", disable=not progress, leave=False
        ) as shown:
            before = int(evaluation.rows.sum())
            while going := [climb for climb in climbs if climb.going]:
                if self.strategy == "gradient":
                    _rank([climb for climb in going if climb.ranked is None], evaluation, usable, vectors)
                _step(going, evaluation, usable, texts)
                shown.update(int(evaluation.rows.sum()) - before)
                before = int(evaluation.rows.sum())
        best = [min(climb.seen.items(), key=lambda item: item[1]) for climb in climbs]
        return TokensFound(
            ids=torch.tensor([ids for ids, _ in best]),
            positions=evaluation.positions,
            loss=torch.tensor([loss for _, loss in best]),
            initial=torch.tensor([climb.initial for climb in climbs]),
            rows=evaluation.rows,
            gradients=evaluation.gradients,
            found_at=torch.tensor([climb.trail[-1].rows for climb in climbs]),
            layer_forwards=evaluation.layer_forwards,
            depth=evaluation.depth,
            trail=tuple(tuple(climb.trail) for climb in climbs),
        )


@final
@dataclass(eq=False)
class _Climb:
    """The search of one prompt.

    Attributes:
        seen: the loss of all that was evaluated.
        pivot: what candidates are made from; empty where they are drawn at random.
        ranked: at the pivot, usable tokens from best to worst by the gradient, shape [slot, v].
        reach: how many of them candidates draw from.
        stale: steps since the pivot was last improved on.
        spent: rows so far.
        gradients: those of them that were differentiated.
        trail: every improvement, the prompt as it came first.
    """

    settings: TokenSearch
    prompt: int
    generator: torch.Generator
    initial: float
    seen: dict[Ids, float]
    pivot: Ids = ()
    spent: int = 1
    gradients: int = 0
    trail: list[Progress] = field(default_factory=list[Progress])
    reach: int = 0
    stale: int = 0
    ranked: Tensor | None = None
    left: set[Ids] = field(default_factory=set[Ids])
    exhausted: bool = False

    @property
    def best(self) -> float:
        """The lowest loss so far."""
        return min(self.seen.values(), default=math.inf)

    @property
    def room(self) -> int:
        """Rows that are left."""
        return self.settings.budget - self.spent

    @property
    def going(self) -> bool:
        """Whether there is anything left to do."""
        return not self.exhausted and self.best > 0 and self.room > 0

    def start(self, pivot: Ids) -> None:
        """Go on from here."""
        self.left.add(self.pivot)
        self.pivot, self.ranked, self.reach, self.stale = pivot, None, self.settings.top_k, 0

    def elsewhere(self) -> None:
        """Go on from the best of the buffer that was not started from, or else, without a pivot, from random ids."""
        kept = sorted(self.seen.items(), key=lambda item: item[1])[: self.settings.buffer]
        self.left.add(self.pivot)
        if fresh := [ids for ids, _ in kept if ids not in self.left]:
            self.start(fresh[0])
        else:
            self.pivot, self.ranked = (), None

    def learn(self, losses: dict[Ids, float]) -> None:
        """Take in what was evaluated."""
        before = self.best
        for ids, loss in losses.items():
            self.spent += 1
            if loss < before:
                before = loss
                self.trail.append(Progress(self.spent, self.gradients, ids))
        self.seen |= losses
        if not losses:
            return
        ids, loss = min(losses.items(), key=lambda item: item[1])
        if not self.pivot or loss < self.seen[self.pivot]:
            self.start(ids)
        else:
            self.stale += 1
            if self.stale >= self.settings.patience:
                self.elsewhere()


@final
class _Texts:
    """Checks that complete id sequences survive being written and read again."""

    def __init__(self, model: HookedModel, evaluation: Evaluation) -> None:
        self.tokenizer = model.tokenizer
        batch, self.positions = evaluation.batch, evaluation.positions.tolist()
        self.rows: list[list[int]] = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        require_survivors(self.tokenizer, self.rows)

    def kept(self, prompt: int, candidates: list[Ids]) -> list[Ids]:
        """Those that survive."""
        rows: list[list[int]] = []
        for candidate in candidates:
            row = list(self.rows[prompt])
            for position, token in zip(self.positions[prompt], candidate, strict=True):
                row[position] = token
            rows.append(row)
        return [ids for ids, good in zip(candidates, survive(self.tokenizer, rows), strict=True) if good]


def _begun(settings: TokenSearch, evaluation: Evaluation, usable: Tensor) -> list[_Climb]:
    """One climb a prompt. The prompt as it came gives the loss to begin with, and is a candidate if it may be."""
    given, may = evaluation.given(), set(usable.tolist())
    losses = evaluation.of_ids(range(len(given)), given).tolist()
    climbs: list[_Climb] = []
    for prompt, (ids, loss) in enumerate(zip(given.tolist(), losses, strict=True)):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + prompt)
        seen = {tuple(ids): loss} if may.issuperset(ids) else {}
        trail = [Progress(1, 0, tuple(ids))]
        climbs.append(_Climb(settings, prompt, generator, loss, seen, trail=trail))
    return climbs


def _rank(climbs: Sequence[_Climb], evaluation: Evaluation, usable: Tensor, vectors: dict[int, Tensor]) -> None:
    """Order the usable tokens of every slot by the gradient at each pivot."""
    ready = [climb for climb in climbs if climb.pivot and climb.room > 1]
    if not ready:
        return
    prompts = [climb.prompt for climb in ready]
    _, gradients = evaluation.gradients_of(prompts, torch.tensor([climb.pivot for climb in ready]))
    learned = evaluation.model.spec.learned_positions
    for climb, gradient in zip(ready, gradients, strict=True):
        climb.spent += 1
        climb.gradients += 1
        slots: list[Tensor] = []
        for slot, position in enumerate(evaluation.positions[climb.prompt].tolist()):
            key = position if learned else 0
            if key not in vectors:
                vectors[key] = token_vectors(evaluation.model, usable, position=key)
            rise = vectors[key].float() @ gradient[slot].float()
            slots.append(usable[rise.argsort()])
        climb.ranked = torch.stack(slots)


def _step(climbs: Sequence[_Climb], evaluation: Evaluation, usable: Tensor, texts: _Texts | None) -> None:
    """Propose, evaluate and learn, for all climbs in shared passes."""
    proposed = [(climb, _proposals(climb, usable, evaluation.positions.shape[1], texts)) for climb in climbs]
    prompts = [climb.prompt for climb, candidates in proposed for _ in candidates]
    if prompts:
        ids = torch.tensor([ids for _, candidates in proposed for ids in candidates])
        losses = iter(evaluation.of_ids(prompts, ids).tolist())
    else:
        losses = iter(())
    for climb, candidates in proposed:
        climb.learn({ids: next(losses) for ids in candidates})


def _proposals(climb: _Climb, usable: Tensor, slots: int, texts: _Texts | None) -> list[Ids]:
    """Candidates that were not evaluated before, at most a step's width and what the budget leaves."""
    wanted = min(climb.settings.width, climb.room)
    if climb.ranked is None:
        size = min(wanted, climb.settings.buffer) if climb.spent == 1 else wanted
        drawn = _fresh(climb, lambda n: usable[_integers(len(usable), (n, slots), climb)], size, texts)
        drawn = drawn or _fresh(climb, lambda _: _remaining(climb, usable, slots), size, texts)
        climb.exhausted = not drawn
        return drawn
    while True:
        drawn = _fresh(climb, lambda n: _neighbours(climb, n, slots), wanted, texts)
        if drawn and (len(drawn) == wanted or climb.reach >= len(usable)):
            return drawn
        if climb.reach >= len(usable):
            climb.elsewhere()
            return []
        climb.reach *= 2


def _neighbours(climb: _Climb, n: int, slots: int) -> Int[Tensor, "n slot"]:
    """The pivot with some of its positions changed to well-ranked tokens."""
    ranked = climb.ranked
    if ranked is None:
        raise RuntimeError("candidates were asked for before the tokens were ranked")
    count = n_replaced(slots, climb.seen[climb.pivot], climb.initial, climb.settings.rho)
    order = torch.rand(n, slots, generator=climb.generator).argsort(1)
    chosen = order < count
    picked = _integers(min(climb.reach, ranked.shape[1]), (n, slots), climb)
    new = ranked.T.gather(0, picked)
    return torch.where(chosen, new, torch.tensor(climb.pivot))


def _fresh(climb: _Climb, draw: Callable[[int], Tensor], wanted: int, texts: _Texts | None) -> list[Ids]:
    """Distinct draws that were not evaluated before and that survive as texts."""
    drawn: list[list[int]] = draw(4 * wanted).tolist()
    fresh = [ids for ids in dict.fromkeys(map(tuple, drawn)) if ids not in climb.seen]
    if texts is None:
        return fresh[:wanted]
    kept: list[Ids] = []
    while fresh and len(kept) < wanted:  # texts are dear, and mostly survive: no more of them than are wanted
        part, fresh = fresh[: wanted - len(kept)], fresh[wanted - len(kept) :]
        kept += texts.kept(climb.prompt, part)
    return kept


def _remaining(climb: _Climb, usable: Tensor, slots: int) -> Int[Tensor, "n slot"]:
    """All that is left of a space small enough to list, in random order; nothing of a larger one."""
    if len(usable) ** slots > _LISTED:
        return torch.empty(0, slots, dtype=torch.long)
    left = [ids for ids in itertools.product(usable.tolist(), repeat=slots) if ids not in climb.seen]
    order = torch.randperm(len(left), generator=climb.generator)
    return torch.tensor(left, dtype=torch.long).reshape(-1, slots)[order]


def _integers(below: int, shape: tuple[int, int], climb: _Climb) -> Tensor:
    return torch.randint(below, shape, generator=climb.generator)
