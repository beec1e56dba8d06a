"""Does the effect depend on which inner product the projection uses?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.interventions.conditions import Condition
from subspace_probe.linalg.shrinkage import inverse_times, oas


@final
@dataclass(frozen=True)
class MetricSensitivity(CaseCheck):
    """The exchange by the projector P_S = V (V^T S V)^-1 V^T S of another inner product, instead of by V V^T.

    The Euclidean projector is not invariant: stretching the space, which changes nothing for the model, changes what is
    exchanged. S is the inverse of the covariance within the classes, shrunk (the whitened space of LDA): the same
    directions are written, and read with less of what varies beside them.

    Estimate: the share of the partners' difference that the whitened exchange brings about. Null: none; the Euclidean
    exchange is the comparison. Supported where both change the side of most prompts, or neither does; else
    inconclusive, and never decides. A true coordinate read through correlated noise keeps its effect; where the two
    disagree, the finding belongs to the choice of coordinates. Measured: .82 to 1.02 for 14 faithful directions,
    anything from .02 to 1.00 for 14 illusory ones, so it tells no illusion by itself. Applies to every intervention
    with an orthogonal subspace. Cannot see what both projectors share: what is written. (The dependence is noted by Wu
    et al. 2024, arXiv:2401.12631, for changes of basis.)
    """

    name: ClassVar[str] = "metric_sensitivity"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does the effect depend on which inner product the projection uses?"
    on: ClassVar[Prompts] = "natural"

    def missing(self, case: Case) -> str:
        """Needs an orthogonal subspace."""
        if case.whole:
            return case.whole
        try:
            case.subspace.require_projection("given another inner product")
        except ConfigError as error:
            return str(error)
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Both projectors."""
        pairs, basis = case.pairs, case.subspace.basis.double().cpu()
        reader = whitened_reader(pairs.base, pairs.row_labels, basis)
        return [
            pairs.moved(pairs.within(case.subspace)),
            pairs.moved((pairs.difference.double() @ reader.T @ basis).float()),
        ]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The effect by either."""
        pairs = case.pairs
        flips = pairs.flips(values).double().mean(1).tolist()
        shares = pairs.shares(values).mean(1).tolist()
        estimate, interval = pairs.share_of(values[1], seed=case.seed)
        note = (
            f"by the whitened projector it moves {shares[1]:.0%} of the difference and changes the side of "
            f"{flips[1]:.0%} of prompts, by the Euclidean one {shares[0]:.0%} and {flips[0]:.0%}"
        )
        claim = "the effect does not turn on the inner product"
        verdict = "supported" if (flips[0] >= 0.5) == (flips[1] >= 0.5) else "inconclusive"
        name = "mechanism.metric_sensitivity"
        return [Finding(name, claim, estimate, interval, None, len(pairs), verdict, note=note)]


def whitened_reader(
    states: Float[Tensor, "rows d"], labels: Int[Tensor, " rows"], basis: Float[Tensor, "k d"]
) -> Float64[Tensor, "k d"]:
    """Rows (V^T S V)^-1 V^T S that read the coordinates along a basis, S the inverse of the shrunk covariance.

    The covariance is taken in the span of the states and the basis: nothing of d x d is made.
    """
    base, v = states.double(), basis.double()
    centred = torch.cat([base[labels == label] - base[labels == label].mean(0) for label in (0, 1)])
    # the difference between the classes has to lie in the frame, or the reader would not see it
    frame = torch.linalg.svd(torch.cat([v, base]), full_matrices=False)[2]
    inside, rows = v @ frame.T, centred @ frame.T
    covariance, _ = oas(rows.T @ rows / max(1, len(rows) - 2), len(rows))
    reader = inverse_times(covariance, inside)
    return torch.linalg.solve(reader @ inside.T, reader) @ frame
