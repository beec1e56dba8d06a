"""Does the whole component do what the subspace does?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.interventions.conditions import Condition


@final
@dataclass(frozen=True)
class Containment(CaseCheck):
    """Interchange of the subspace beside that of what contains it: the whole state of its component, the residual
    stream behind it at the same tokens, and the stream at all tokens.

    Estimate: the excess XS = IIA(V) - IIA(component), the share of prompts that change sides (Makelov et al. 2023). A
    patch of the whole component is what the model itself does; a part of it that does more is doing something of its
    own: a dormant pathway, or a part that the rest of the state opposes.

    Faithful: -.4 to +.05 in the residual stream, up to +.35 at MLPs; illusory: .86 and more (the published MLP of
    GPT-2 small: 46 % of the margin against -8 %). Supported: it lies below `inflated`, its interval below `excess`;
    refuted: it reaches `excess`, and its interval does not include `inflated`. Between them the subspace is *inflated*:
    the component carries some of it. Applies to every intervention with a subspace. Cannot see an illusion where the
    component works as well, as in leaky pathways.
    """

    name: ClassVar[str] = "containment"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does the whole component do what the subspace does?"
    on: ClassVar[Prompts] = "natural"

    excess: float = 0.5
    inflated: float = 0.2

    def missing(self, case: Case) -> str:
        """Needs a subspace."""
        return case.whole

    def conditions(self, case: Case) -> Sequence[Condition]:
        """The subspace, and everything that contains it."""
        pairs = case.pairs
        return [pairs.moved(pairs.within(case.subspace)), *(patch for _, patch in pairs.containers)]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The excess over the component."""
        pairs = case.pairs
        flips, shares = pairs.flips(values).double(), pairs.shares(values).mean(1)
        estimate, interval = pairs.rate_of(flips[0] - flips[1], seed=case.seed)
        names = [name for name, _ in pairs.containers]
        around = ", ".join(
            f"{name} {float(flip.mean()):.0%} ({float(share):.0%})"
            for name, flip, share in zip(names, flips[1:], shares[1:], strict=True)
        )
        note = (
            f"the subspace changes the side of {float(flips[0].mean()):.0%} of prompts and moves {float(shares[0]):.0%}"
        )
        note += (
            f" of the difference; what contains it: {around} (illusions: an excess of .86 and more; faithful: < .35)"
        )
        claim = "the whole component does what the subspace does"
        if flips[0].mean() < 0.5:
            return [case.untested(self, f"the subspace has too little effect to be contained: {note}")]
        verdict = "inconclusive"
        if estimate < self.inflated and interval.high < self.excess:
            verdict = "supported"
        elif estimate >= self.excess and interval.low > self.inflated:
            verdict = "refuted"
        found = Finding("mechanism.containment", claim, estimate, interval, None, len(pairs), note=note)
        return [replace(found, verdict=verdict)]
