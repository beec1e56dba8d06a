"""Do its sites act together, or each for itself?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import mean_of
from subspace_probe.core.protocols import Intervention
from subspace_probe.core.sites import Site
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.diagnostics.rewritten import Rewritten
from subspace_probe.interventions.conditions import Condition


def _only(intervention: Intervention, sites: frozenset[Site]) -> Condition:
    """The intervention at some of its sites, and nothing at the others."""
    return Rewritten(intervention, lambda edits: {site: edit for site, edit in edits.items() if site in sites})


@final
@dataclass(frozen=True)
class Interaction(CaseCheck):
    """The effect at all sites, less the sum of the effects at each site alone: I = E(all) - sum of E(i).

    Where there are more than `most` sites, those of one layer count as one. Estimate: I, in units of the metric. Null:
    none; 0 is additive. Near 0 the effect may be divided among the sites; far from it no site has a share of its own
    (Vaidyanathan et al., arXiv:2606.27510, on interaction terms). Negative of the effect's sign: the sites repeat each
    other, as ablation at every layer does; positive: they need each other. Supported within `additive` of the effect,
    else inconclusive; never decides. Expected of faithful and illusory subspaces alike. Applies to interventions at
    several sites. Cannot see which sites interact.
    """

    name: ClassVar[str] = "interaction"
    question: ClassVar[str] = "Do its sites act together, or each for itself?"

    most: int = 16
    additive: float = 0.25

    def missing(self, case: Case) -> str:
        """Needs several sites."""
        return "" if len(self._apart(case)) > 1 else "it acts at one site, or in one layer."

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Each site, or layer, alone."""
        return [_only(case.intervention, sites) for sites in self._apart(case)]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The interaction, and the largest single effects."""
        single = (values - case.clean).double()
        both = (case.edited - case.clean).double()
        estimate, interval = mean_of(both - single.sum(0), case.contrast.groups, seed=case.seed)
        whole, means = float(both.mean()), single.mean(1)
        names = [", ".join(site.short for site in sorted(sites, key=lambda s: s.order)) for sites in self._apart(case)]
        largest = [f"{names[i]} {float(means[i]):+.2f}" for i in means.abs().argsort(descending=True)[:3].tolist()]
        note = f"all together {whole:+.2f}, the sum of each alone {float(means.sum()):+.2f}; most alone: "
        note += "; ".join(largest)
        claim = "the effect is the sum of what each site does alone"
        allowed = self.additive * abs(whole)
        verdict = "supported" if interval.low >= -allowed and interval.high <= allowed else "inconclusive"
        return [Finding("control.interaction", claim, estimate, interval, None, len(case.contrast), verdict, note=note)]

    def _apart(self, case: Case) -> list[frozenset[Site]]:
        sites = sorted(case.intervention.edits(case.model.spec.n_layers), key=lambda site: site.order)
        if len(sites) <= self.most:
            return [frozenset({site}) for site in sites]
        layers = sorted({site.layer for site in sites})
        return [frozenset(site for site in sites if site.layer == layer) for layer in layers]
