"""Does rerouting work through the subspace?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import ConfigError, DataError, PositionError, SiteError
from subspace_probe.core.findings import Finding, Verdict, judge_absence
from subspace_probe.core.intervals import mean_of, shares
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, place_of
from subspace_probe.diagnostics.exchange import NOTHING
from subspace_probe.diagnostics.natural import Natural
from subspace_probe.diagnostics.reader_split import unreadable
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.interventions.reroute import Reroute
from subspace_probe.interventions.targets import HalfSpace


@final
@dataclass(frozen=True)
class Mediation(CaseCheck):
    """Prompts that were rewritten to move their states: how much of what that does goes through the subspace?

    TE is the metric of the rewritten prompt less that of the original; with the subspace's coordinates put back to the
    original's, some of it is left, and NIE = TE - what is left (Pearl 2001, the natural indirect effect). The same with
    the part that is read and with the whole component put back. Beside it the hit rate (rewritten states in the target,
    or nearer to the positive class along the subspace), and the leakage |(1 - P) D| / |D|: how much else moved.

    Estimate: NIE / TE. Null: none; 0 is no mediation. Supported from one half on where the whole component mediates
    half too; refuted where the interval lies within `margin` of nothing: the rewriting works, and not through this
    (toy: total effect 100 %, mediated 0 by the disconnected neuron). A faithful subspace mediates most. It is no
    evidence by itself: a mixture of a disconnected and a dormant direction mediates 100 % as well, and its component 0.
    Applies to every intervention with a subspace, given `rerouted`. Cannot see what the rewriting changes at other
    tokens.
    """

    name: ClassVar[str] = "mediation"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does what rewriting the prompts does go through the subspace?"

    margin: float = NOTHING

    def missing(self, case: Case) -> str:
        """Needs rewritten prompts."""
        if case.whole:
            return case.whole
        if case.rerouted is None:
            return "audit was given no rewritten prompts (rerouted=...)."
        try:
            case.subspace.require_projection("put back along its basis alone")
        except ConfigError as error:
            return str(error)
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Runs on its own prompts."""
        return []

    def passes(self, case: Case) -> int:
        """States, clean runs, and what is put back."""
        return 0 if case.rerouted is None else 5 * len(case.rerouted)

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """How much is mediated."""
        if case.rerouted is None:
            return []
        try:
            site, where = place_of(case.model, case.intervention)
            pairs = Natural(case.model, case.rerouted, site, where, case.metric, pairs=len(case.rerouted))
        except (DataError, PositionError, SiteError) as error:
            return [case.untested(self, str(error))]
        half, groups = len(pairs) // 2, pairs.prompts.groups[len(pairs) // 2 :]
        total = pairs.clean[half:] - pairs.clean[:half]
        effect, spread = mean_of(total, groups, seed=case.seed)
        if judge_absence(spread, margin=case.margin) != "refuted":
            reason = f"rewriting the prompts changes the metric by {effect:+.2f} only, so there is nothing to mediate."
            return [case.untested(self, reason)]
        names, moves = self._restored(case, pairs)
        back = outcomes(case.model, pairs.prompts.prompts, [pairs.moved(move) for move in moves], [case.metric])[0]
        through = [shares(pairs.clean[half:] - row[half:], total) for row in back]
        estimate, interval = mean_of(through[0], groups, seed=case.seed)
        said = ", ".join(f"{name} {float(t.mean()):.0%}" for name, t in zip(names, through, strict=True))
        note = f"rewriting the prompts changes the metric by {effect:+.2f}, of which goes through {said}"
        note += f"; {_hits(case, pairs)}"
        verdict: Verdict = "inconclusive"
        if judge_absence(interval, margin=self.margin) == "supported":
            verdict = "refuted"
        elif interval.low > self.margin and estimate >= 0.5 and float(through[-1].mean()) >= 0.5:
            verdict = "supported"
        claim = "what rewriting the prompts does goes through the subspace"
        return [Finding("mechanism.mediation", claim, estimate, interval, None, half, verdict, note=note)]

    def _restored(self, case: Case, pairs: Natural) -> tuple[list[str], list[Tensor]]:
        """What is put back: the subspace, what is read of it, the whole component."""
        found = {"the subspace": pairs.within(case.subspace)}
        if not unreadable(case):
            row = case.pairs.read_space.split(case.subspace).row
            found["the part of it that is read"] = pairs.along(row)
        found[f"the whole of {pairs.site.short}"] = pairs.difference
        return list(found), list(found.values())


def _hits(case: Case, pairs: Natural) -> str:
    """Where the rewritten states came to lie, and how much else moved."""
    rewritten = pairs.row_labels == 1
    inside, whole = (move[rewritten].double().norm(dim=1) for move in (_inside(case, pairs), pairs.difference))
    leakage = float(((whole.square() - inside.square()).clamp(min=0).sqrt() / whole.clamp(min=1e-30)).mean())
    said = f"leakage {leakage:.0%} of the move's length"
    states, edit = pairs.base[rewritten], case.intervention
    if isinstance(edit, Reroute) and isinstance(edit.target, HalfSpace):
        hit = edit.target.score(states) >= edit.target.margin
        return f"{float(hit.double().mean()):.0%} of rewritten states lie in the target; {said}"
    if case.natural is None:
        return said
    base, labels = case.natural.base, case.natural.row_labels
    means = [case.subspace.coords(base[labels == label]).mean(0) for label in (0, 1)]
    to = torch.stack([(case.subspace.coords(states) - mean).norm(dim=1) for mean in means])
    return f"{float((to[1] < to[0]).double().mean()):.0%} of rewritten states lie nearer to the positive class; {said}"


def _inside(case: Case, pairs: Natural) -> Float[Tensor, "rows d"]:
    return pairs.within(case.subspace)
