"""Where does an exchange of whole states work? (positive control)"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.core.tokens import LAST
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.interventions.conditions import Condition


@final
@dataclass(frozen=True)
class Elsewhere(CaseCheck):
    """Interchange of whole residual states, at the site's tokens and at the last ones, over the layers.

    The positive control of an exchange without effect: where the same prompts and the same metric do move. Estimate:
    the largest share restored; supported from `works` on. The whole state behind the last layer at the last token
    always works, since the logits are computed from it, and does not count. The note gives the earliest layer: an
    exchange at the site's own tokens that works says that the site is read, and not along this subspace; none, that
    the site is not read. Applies to every intervention with a subspace.
    """

    name: ClassVar[str] = "elsewhere"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Where does an exchange of whole states work?"
    on: ClassVar[Prompts] = "natural"

    works: float = 0.5
    layers: int = 6

    def missing(self, case: Case) -> str:
        """Needs a subspace."""
        return case.whole

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Some layers, at each position."""
        return [patch for *_, patch in case.pairs.residual(self.layers)]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The best place, and the earliest that works."""
        pairs = case.pairs
        places, shares = pairs.residual(self.layers), pairs.shares(values).mean(1)
        trivial = [site.layer + 1 == pairs.model.spec.n_layers and where == LAST for site, where, _ in places]
        best = int(shares.masked_fill(torch.tensor(trivial), -torch.inf).argmax())
        estimate, interval = pairs.share_of(values[best], seed=case.seed)
        said: list[str] = []
        for where in dict.fromkeys(where for _, where, _ in places):
            own = [(site, float(share)) for (site, w, _), share in zip(places, shares, strict=True) if w == where]
            first = next(((site, share) for site, share in own if share >= self.works), None)
            most = max(share for _, share in own)
            said.append(
                f"at {where} from {first[0].short} on ({first[1]:.0%})" if first else f"at {where} nowhere ({most:.0%})"
            )
        claim = "whole states exchanged elsewhere move the behaviour, so that no effect here means something"
        note = f"whole residual states move the behaviour {'; '.join(said)}"
        found = Finding("mechanism.elsewhere", claim, estimate, interval, None, len(pairs), note=note)
        works = interval.low > self.works / 2 and estimate >= self.works
        return [replace(found, verdict="supported" if works else "refuted")]
