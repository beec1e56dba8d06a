"""What is lost when it is taken out? (necessity)"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.reader_split import unreadable
from subspace_probe.interventions.conditions import Condition


@final
@dataclass(frozen=True)
class Necessity(CaseCheck):
    """Ablation of the subspace, of what contains it and of what is read of it; and the exchange of all the rest.

    Coordinates are set to their mean over the natural pairs (or to zero, `to`), x - P (x - mean), for P the subspace,
    its visible part, the span of its visible and invisible parts, and the whole component. Each row says how much of
    the difference between the partners is gone, 1 - gap after / gap before. The complement is exchanged beside them:
    all but the subspace.

    Estimate: what the subspace loses beyond the whole component. Null: none. Only the *difference* between rows is
    evidence: an illusory subspace is "necessary" too (100 % in the toy of three neurons, .996 in the analytic bed), but
    its span and its component are not (0 and .002); of a faithful one all are. Measured estimates: -.22 to .19 for 14
    faithful directions of the residual stream, .47 to 1.64 for 14 illusory ones at MLPs. Supported where the whole
    component loses at least half of what the subspace does; never decides. Applies to every intervention with a
    subspace. Cannot see repair by later layers, which makes what is necessary look dispensable. (Makelov et al. 2023,
    arXiv:2311.17030.)
    """

    name: ClassVar[str] = "necessity"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "What is lost when it, or what contains it, is taken out?"
    on: ClassVar[Prompts] = "natural"

    to: Literal["mean", "zero"] = "mean"

    def missing(self, case: Case) -> str:
        """Needs an orthogonal subspace."""
        if case.whole:
            return case.whole
        try:
            case.subspace.require_projection("ablated along its basis alone")
        except ConfigError as error:
            return str(error)
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """The ablations, then the exchange of the complement."""
        pairs = case.pairs
        base = pairs.base.double()
        away = (0.0 if self.to == "zero" else base.mean(0)) - base
        moves = [away if basis is None else away @ basis.T @ basis for _, basis in _taken(case)]
        rest = pairs.difference - pairs.along(case.subspace.basis)
        return [pairs.moved(move.float()) for move in (*moves, rest)]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """What each loses."""
        pairs, names = case.pairs, [name for name, _ in _taken(case)]
        # partners that come half way to each other have lost the whole difference
        lost = 2 * pairs.shares(values[:-1])
        estimate, interval = pairs.rate_of(lost[0] - lost[-1], seed=case.seed)
        said = ", ".join(f"{name} {float(share):.0%}" for name, share in zip(names, lost.mean(1), strict=True))
        rest = float(pairs.shares(values[-1]).mean())
        note = (
            f"ablated to {self.to}, of the difference is lost: {said}; exchanging all but the subspace moves "
            f"{rest:.0%} (an illusion: the subspace 100%, the component 0%; faithful: both)"
        )
        claim = "what contains the subspace is needed as much as the subspace is"
        subspace, component = float(lost[0].mean()), float(lost[-1].mean())
        verdict = "supported" if subspace > 0.25 and component >= subspace / 2 else "inconclusive"
        return [Finding("mechanism.necessity", claim, estimate, interval, None, len(pairs), verdict, note=note)]


def _taken(case: Case) -> list[tuple[str, Float[Tensor, "k d"] | None]]:
    """What is ablated: orthonormal rows, or None for everything."""
    found: list[tuple[str, Tensor | None]] = [("the subspace", case.subspace.basis.double().cpu())]
    if not unreadable(case):
        split = case.pairs.read_space.split(case.subspace)
        if split.row is not None:
            found.append(("the part that is read", split.row))
        found.append(("both parts together", split.span))
    return [*found, (f"the whole of {case.pairs.site.short}", None)]
