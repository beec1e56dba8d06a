"""The heads that fetch the name, and what their queries see of the stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Expectation, Finding
from subspace_probe.core.intervals import mean_of, range_of, shares
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where
from subspace_probe.diagnostics.read_space import ReadSpace
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.interventions.path_patch import path_patch
from subspace_probe.linalg.illusions import row_space
from subspace_probe.metrics import metric_for
from subspace_probe.models.hooked import HookedModel
from subspace_probe.models.reading import readers

NOTHING = 0.1
"""Half-width of "no effect", in shares of the difference."""


@final
@dataclass(frozen=True, eq=False)
class Movers:
    """Share of the partners' difference that each later head carries to the logits, past all other heads.

    Attributes:
        shares: by head, per prompt.
        least: from which share on a head is named.
        most: so many are named at most.
    """

    shares: Mapping[Site, Float[Tensor, " n"]]
    least: float
    most: int
    groups: tuple[int, ...]
    seed: int

    @property
    def named(self) -> list[Site]:
        """The heads that are named, strongest first, by one half of the groups."""
        means = {site: float(values[self._naming].mean()) for site, values in self.shares.items()}
        return sorted((s for s in means if means[s] >= self.least), key=lambda s: -means[s])[: self.most]

    @property
    def _naming(self) -> Bool[Tensor, " n"]:
        """The prompts that heads are named by; their share is measured on the others."""
        order = {group: place for place, group in enumerate(dict.fromkeys(self.groups))}
        return torch.tensor([order[group] % 2 == 0 for group in self.groups])

    def findings(self, known: bool) -> list[Finding]:
        """What the named heads carry together on other prompts, beside as many of the other heads."""
        named, held = self.named, ~self._naming
        claim = "the named heads carry the difference to the logits, past as many other heads"
        if not named:
            note = f"no later head carries {self.least:.0%}"
            return [Finding("heads.share", claim, 0.0, None, None, int(held.sum()), "refuted", note=note)]
        groups = [group for group, kept in zip(self.groups, held.tolist(), strict=True) if kept]
        estimate, interval = mean_of(self._together(named)[held], groups, seed=self.seed)
        others = self._others(named)
        sums = [self._together(some)[held].mean() for some in others]
        null = range_of(torch.stack(sums), f"{len(others)} sets of as many other heads") if others else None
        note = ", ".join(f"{site.short} {float(self.shares[site][held].mean()):.0%}" for site in named)
        expected = Expectation(above=0.3) if known else None
        found = Finding("heads.share", claim, estimate, interval, null, len(groups), expected=expected, note=note)
        return [found.judged("above", margin=NOTHING)]

    def _others(self, named: Sequence[Site]) -> list[tuple[Site, ...]]:
        """Sets of as many heads that are not named: all there are, or 200 at random."""
        rest = [site for site in self.shares if site not in named]
        if comb(len(rest), len(named)) <= 200:
            return list(combinations(rest, len(named)))
        generator = torch.Generator().manual_seed(self.seed)
        orders = [torch.randperm(len(rest), generator=generator)[: len(named)].tolist() for _ in range(200)]
        return [tuple(rest[place] for place in order) for order in orders]

    def _together(self, sites: Sequence[Site]) -> Float[Tensor, " n"]:
        return torch.stack([self.shares[site] for site in sites]).sum(0)

    def rows(self) -> list[dict[str, Any]]:
        """Of the table `heads`."""
        found: list[dict[str, Any]] = []
        for site, values in self.shares.items():
            share, spread = mean_of(values, self.groups, seed=self.seed)
            ends = {"low": spread.low, "high": spread.high, "named": site in self.named}
            found.append({"layer": site.layer, "head": site.head, "share": share, **ends})
        return found


def fetching_heads(
    model: HookedModel, train: Contrast, stream: Site, where: Where, least: float, most: int, seed: int
) -> Movers:
    """Effect of every head behind a state on the logits and by no other head, by path patching from the partner.

    MLPs are recomputed, as in Wang et al. 2022 (arXiv:2211.00593).
    """
    metric = metric_for("logit_difference", model)
    source, base = train.sides()
    n_layers = model.spec.n_layers
    first = stream.layer + (stream.stream == "resid_post")
    heads = [Site(layer, "z", head) for layer in range(first, n_layers) for head in range(model.spec.n_heads)]
    paths = [
        path_patch(model, base, source, head, Site(n_layers - 1), where=where, freeze=("attn_out",)) for head in heads
    ]
    clean = outcomes(model, source.prompts, [None], [metric])[0, 0]
    values = outcomes(model, base.prompts, [None, *paths], [metric])[0]
    found = shares(values[1:] - values[0], clean - values[0])
    return Movers(dict(zip(heads, found, strict=True)), least, most, base.groups, seed)


def query_space(model: HookedModel, stream: Site, heads: Sequence[Site]) -> ReadSpace:
    """What the queries of some heads see of a residual stream, each through the gain of its own block's norm.

    A proxy, as published: other readers of the stream see the rest too, so that it is not provably unread.

    Raises:
        ConfigError: no heads, or a family whose query weights cannot be told from others.
    """
    if not heads:
        raise ConfigError("No head behind the state fetches the answer, so nothing asks by it. Lower least_share.")
    found: list[Tensor] = []
    size, d_model = model.spec.d_head, model.spec.d_model
    for head in heads:
        matrices = {m.name: m for m in readers(model.backend, Site(head.layer, "resid_pre"))}
        query = next((m for name, m in matrices.items() if name.endswith(("q_proj.weight", "query.weight"))), None)
        # GPT-2 keeps queries, keys and values in one matrix, the queries first
        query = query or next((m for name, m in matrices.items() if name.endswith("attn.c_attn.weight")), None)
        if query is None or head.head is None:
            raise ConfigError(f"The queries of {model.spec.family} could not be told from {', '.join(matrices)}.")
        rows = torch.cat(list(query.vectors()))
        found.append(rows[head.head * size : (head.head + 1) * size])
    space = row_space(torch.cat(found))
    if space.rank >= d_model:
        raise ConfigError(f"The queries of {len(heads)} heads see all of the stream. Lower most_heads.")
    return ReadSpace(f"the queries of {', '.join(head.short for head in heads)}", space, exact=False)
