"""What a target inside the model is worth to a search: it, the answer itself, and chance, at equal budgets.

Budgets are counted in rows that the model was run on and in blocks that rows went through: a target at a layer is read
there and no further, so that its rows are cheaper than those of a search for the answer. Each search is run once; what
it would have found with less is read off its trail. After Winninger et al. 2025, https://arxiv.org/abs/2503.06269.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.protocols import Metric
from subspace_probe.core.tokens import LAST, TokenBatch, Where
from subspace_probe.diagnostics.ladder import MARGIN
from subspace_probe.diagnostics.rungs import observe
from subspace_probe.interventions.objectives import AnswerMargin, Reach, replaced
from subspace_probe.interventions.targets import HalfSpace
from subspace_probe.interventions.token_search import TokenSearch
from subspace_probe.interventions.tokens_found import TokensFound
from subspace_probe.linalg.resampling import bootstrap_statistic
from subspace_probe.models.hooked import HookedModel

TARGET, ANSWER, RANDOM = "target", "answer", "random"
Unit = Literal["rows", "layer-forwards"]
_EXCHANGES = 999


@final
@dataclass(frozen=True, eq=False)
class Searches:
    """Token searches of one budget on the same prompts.

    Attributes:
        found: by what was aimed at: "target", "answer" (where prompts carry answer and foil), "random".
    """

    model: HookedModel
    contrast: Contrast
    metric: Metric
    budget: int
    found: Mapping[str, TokensFound]

    def flipped(self, search: str, budget: int | None = None, unit: Unit = "rows") -> Bool[Tensor, " n"]:
        """Whose behaviour a search had flipped within so much of its budget; by default all of it."""
        found = self.found[search]
        if budget is None:
            ids = found.ids
        else:
            ids = found.within(rows=budget) if unit == "rows" else found.within(layer_forwards=budget)
        batch, before = self._clean
        after = observe(self.model, replaced(batch, found.positions, ids), [], LAST).logits
        return (self.metric(after, self.contrast.prompts) > 0) != before

    @cached_property
    def _clean(self) -> tuple[TokenBatch, Bool[Tensor, " n"]]:
        batch = self.model.tokens(self.contrast)
        return batch, self.metric(observe(self.model, batch, [], LAST).logits, self.contrast.prompts) > 0

    def curve(self, budgets: Sequence[int], *, seed: int) -> list[dict[str, Any]]:
        """The share of prompts flipped within each budget of rows, and within the blocks that as many rows go through.

        Every row of a budget stands for `n_layers` layer-forwards: what one pass through the whole model takes.
        """
        rows: list[dict[str, Any]] = []
        units: dict[Unit, int] = {"rows": 1, "layer-forwards": self.model.spec.n_layers}
        for search in self.found:
            for unit, each in units.items():
                for budget in budgets:
                    values = self.flipped(search, budget * each, unit).double()
                    rate, spread = mean_of(values, self.contrast.groups, seed=seed)
                    rows.append({
                        "search": search, "unit": unit, "budget": budget * each, "flipped": rate,
                        "low": spread.low, "high": spread.high, "n": len(values),
                    })  # fmt: skip
        return rows

    def ahead(self, of: str, budget: int, unit: Unit = "rows", *, seed: int) -> Finding:
        """By how much the target's share of flipped prompts is ahead of another search's, prompt by prompt.

        The null exchanges the two searches at random within each group of prompts.
        """
        ours, theirs = (self.flipped(search, budget, unit).double() for search in (TARGET, of))
        gain = ours - theirs
        estimate, interval = mean_of(gain, self.contrast.groups, seed=seed)
        null = range_of(
            torch.where(self._swapped(seed), -gain, gain).mean(1), f"{_EXCHANGES} exchanges of the two searches"
        )
        other = "random tokens do" if of == RANDOM else f"a search for the {of} does"
        claim = f"within {budget} {unit} a prompt, a search for the target flips more prompts than {other}"
        name = f"search.ahead_of_{of}.{budget}_{unit.replace('-', '_')}"
        note = f"{float(ours.mean()):.2f} against {float(theirs.mean()):.2f}"
        return Finding(name, claim, estimate, interval, null, len(gain), note=note).judged("above", margin=MARGIN)

    def cost(self, of: str, *, seed: int) -> Finding:
        """How many times the target's layer-forwards another search took, until it was done or had used its budget.

        The null exchanges the two searches at random within each group of prompts.
        """
        ours, theirs = (self._forwards(self.found[name]) for name in (TARGET, of))

        def ratio(index: Tensor) -> float:
            return float(theirs[index].sum() / ours[index].sum())

        everyone = torch.arange(len(ours))
        estimate, groups = ratio(everyone), torch.as_tensor(self.contrast.groups)
        drawn = bootstrap_statistic(ratio, len(ours), clusters=groups, draws=500, seed=seed)
        swap = self._swapped(seed)
        null = torch.where(swap, ours, theirs).sum(1) / torch.where(swap, theirs, ours).sum(1)
        return Finding(
            f"search.cost_of_{of}",
            f"a search for the {of} takes more layer-forwards than one for the target",
            estimate,
            range_of(drawn, "prompts, bootstrap"),
            range_of(null, f"{_EXCHANGES} exchanges of the two searches"),
            len(ours),
        ).judged("above", margin=0.1, no_effect=1.0)

    def _swapped(self, seed: int) -> Bool[Tensor, "exchange n"]:
        """Of which prompts each draw of a null exchanges the two searches: of whole groups."""
        seen, members = torch.as_tensor(self.contrast.groups).unique(return_inverse=True)
        drawn = torch.randint(2, (_EXCHANGES, len(seen)), generator=torch.Generator().manual_seed(seed)).bool()
        return drawn[:, members]

    def _forwards(self, found: TokensFound) -> Float[Tensor, " n"]:
        return (found.depth * (found.rows + 2 * found.gradients)).double()


def compare_searches(
    model: HookedModel,
    contrast: Contrast,
    targets: Sequence[HalfSpace],
    free: Sequence[Where],
    metric: Metric,
    *,
    search: TokenSearch,
    allowed: Collection[int] | None = None,
    banned: Collection[int] = (),
    progress: bool = False,
) -> Searches:
    """Search for the target, for the answer itself and at random, with one budget.

    Args:
        contrast: the prompts to reroute, all of one class.
        targets: to be reached together; each with its site and a one-token `where`.
        free: the tokens that may be changed.
        metric: above 0 for one behaviour, below for the other.
        search: budget and settings.

    Raises:
        PositionError: free positions that differ in number, or a target before all of them.
    """
    given: dict[str, Any] = {"allowed": allowed, "banned": banned, "progress": progress}
    found = {TARGET: search.search(model, contrast, Reach(tuple(targets)), free, **given)}
    if aim := answer_margin(model, contrast):
        found[ANSWER] = search.search(model, contrast, aim, free, **given)
    found[RANDOM] = replace(search, strategy="random").search(model, contrast, Reach(tuple(targets)), free, **given)
    return Searches(model, contrast, metric, search.budget, found)


def answer_margin(model: HookedModel, contrast: Contrast) -> AnswerMargin | None:
    """The objective of a search for the answer: each prompt's foil over its answer; None where a prompt lacks them."""
    words = [(prompt.foil, prompt.answer) for prompt in contrast.prompts if prompt.answer and prompt.foil]
    if len(words) < len(contrast):
        return None
    wanted, own = (torch.tensor(model.token_ids([word for word in side if word])) for side in zip(*words, strict=True))
    return AnswerMargin(wanted, own)
