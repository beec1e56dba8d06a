"""Does the effect survive where every later MLP neuron is kept within its natural range?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.edits import At, EditMap, compose
from subspace_probe.core.errors import UnsupportedSite
from subspace_probe.core.findings import Finding
from subspace_probe.core.protocols import Part
from subspace_probe.core.sites import FORWARD_ORDER, Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST, Where
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.dormancy import natural_range
from subspace_probe.diagnostics.natural import Natural
from subspace_probe.interventions.conditions import Condition
from subspace_probe.interventions.patch import Patch

Ranges = Mapping[Site, tuple[Float[Tensor, " d"], Float[Tensor, " d"]]]
"""Lowest and highest natural value of every unit, by site."""


@final
@dataclass(frozen=True, eq=False)
class Ranged:
    """A patch, if any, with units of later sites kept within a range at the last token."""

    ranges: Ranges
    of: Patch | None = None

    @property
    def subspace(self) -> Subspace | None:
        """That of the patch."""
        return None if self.of is None else self.of.subspace

    @property
    def where(self) -> Where:
        """Where the patch acts, which is no later than the last token."""
        return LAST if self.of is None else self.of.where

    def edits(self, n_layers: int) -> EditMap:
        """The patch, then the ranges."""
        kept = {site: At(LAST, partial(_within, *bounds)) for site, bounds in self.ranges.items()}
        return compose({} if self.of is None else self.of.edits(n_layers), kept)

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """Those of the patch."""
        return [] if self.of is None else self.of.parts(n_layers)

    def with_subspace(self, subspace: Subspace) -> "Ranged":
        """The same ranges around a patch within another subspace."""
        return replace(self, of=None if self.of is None else self.of.with_subspace(subspace))


@final
@dataclass(frozen=True)
class DownstreamClamp(CaseCheck):
    """The exchange, with every MLP neuron behind it clamped to its natural .1 to 99.9 % range at the metric's token.

    Ranges are pooled over both classes. (Those of the target class alone would be an intervention by itself: it brings
    an interchange accuracy of up to 1.00 where the patch alone has .00.) Published as HPC (Liu & Chen), the part of the
    effect that needs values which no natural run shows.

    Estimate: the loss, IIA(V) - IIA(V clamped). Null: the clamp alone, which must do nothing and is reported. It
    decides nothing: measured at most .06 on every set, faithful and illusory alike; on planted pathways of single units
    an AUROC of .99 was reported, near chance on combinations within range. Supported up to `kept`, else inconclusive.
    Applies to every intervention with a subspace, in models whose MLP neurons can be read. Cannot see illusions that
    keep later neurons in range, nor what passes through attention or other tokens; see `clamp` for the actuator itself.
    """

    name: ClassVar[str] = "downstream_clamp"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does the effect survive where later neurons are kept within their natural range?"
    on: ClassVar[Prompts] = "natural"

    kept: float = 0.1

    def missing(self, case: Case) -> str:
        """Needs neurons behind the site."""
        if case.whole or case.natural is None:
            return case.whole or case.no_natural
        sites = later_neurons(case.natural)
        if not sites:
            return f"no MLP lies behind {case.natural.site.short}."
        try:
            case.model.backend.width(sites[0])
        except UnsupportedSite as error:
            return str(error)
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """The exchange, the exchange clamped, the clamp alone."""
        pairs = case.pairs
        acts = pairs.model.capture(pairs.prompts, sites=later_neurons(pairs), where=LAST)
        ranges = {site: _range(acts.at(site)) for site in acts.sites}
        patch = pairs.moved(pairs.within(case.subspace))
        return [patch, Ranged(ranges, patch), Ranged(ranges)]

    def passes(self, case: Case) -> int:
        """The capture of the neurons."""
        return len(case.pairs)

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """What is lost by the clamp."""
        pairs = case.pairs
        flips = pairs.flips(values).double()
        whole, clamped, alone = flips.mean(1).tolist()
        if whole < 0.5:
            return [case.untested(self, f"the subspace changes the side of {whole:.0%} of prompts only.")]
        estimate, interval = pairs.rate_of(flips[0] - flips[1], seed=case.seed)
        note = (
            f"with later neurons in their natural range it changes the side of {clamped:.0%} of prompts, free "
            f"{whole:.0%}; the clamp alone {alone:.0%} (a loss of at most .06 in faithful and illusory cases alike)"
        )
        claim = "the effect does not need values that later neurons never take by themselves"
        verdict = "supported" if estimate <= self.kept else "inconclusive"
        return [Finding("mechanism.downstream_clamp", claim, estimate, interval, None, len(pairs), verdict, note=note)]


def later_neurons(pairs: Natural) -> list[Site]:
    """`mlp_post` of every block behind the site."""
    site, order = pairs.site, FORWARD_ORDER.index("mlp_post")
    first = site.layer + (FORWARD_ORDER.index(site.stream) >= order)
    return [Site(layer, "mlp_post") for layer in range(first, pairs.model.spec.n_layers)]


def _range(states: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    low, high = natural_range(states.float().cpu())
    return low, high


def _within(
    low: Float[Tensor, " d"], high: Float[Tensor, " d"], x: Float[Tensor, "n d"], rows: Int[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    return torch.minimum(torch.maximum(x, low.to(x)), high.to(x))
