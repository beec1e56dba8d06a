"""Who supplies the coefficient of the exchange, and who the effect?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.findings import Finding
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.reader_split import unreadable
from subspace_probe.interventions.conditions import Condition
from subspace_probe.linalg.illusions import RowSpace


@final
@dataclass(frozen=True)
class Ledger(CaseCheck):
    """The exchange V^T V D taken apart: what the invisible part senses and the visible part acts out, and the rest.

    With V = V_row + V_null by the reader of the site (V Pi and V (1 - Pi), not normalised), V^T V D is the sum of
    A^T S D over sensors S and actuators A in {row, null}; each of the four is run. For a linear reader R the write is
    y = R (V_row^T V_row D) + R (V_row^T V_null D), and CTF = <y_cross, y> / <y, y> is the share of it that the patch
    transfers from what the model cannot see (Makelov et al. 2023, arXiv:2311.17030, section 3, in the notation above).

    Estimate: CTF, summed over pairs, with the reader's own gains where it is a matrix. Null: none. Expected near 0 for
    a faithful subspace and 1 for an illusory one (measured .03 to .14 in the residual stream, .79 to 1.03 at MLPs),
    *where the reader is a component's and has many more dimensions than the subspace*; of a reader of rank one every
    visible direction is the same direction (toy: .8 for the true neuron, .6 for the illusion), and not tested then, nor
    where everything is visible. Supported below one half, else inconclusive; never decides. Applies to every
    intervention with a subspace. Cannot see illusions within the visible space.
    """

    name: ClassVar[str] = "ledger"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Does the part that is read act on what it reads itself, or on what nothing reads?"
    on: ClassVar[Prompts] = "natural"

    def missing(self, case: Case) -> str:
        """Needs an orthogonal subspace, and a reader that sees far more than it, but not everything."""
        if reason := unreadable(case):
            return reason
        reader, rank, width = case.pairs.read_space, case.subspace.rank, case.subspace.width
        if reader.rank < 4 * rank:
            return f"a reader of rank {reader.rank} makes the visible parts of all subspaces alike ({reader})."
        if reader.rank >= width:
            return f"everything at the site is read ({reader})."
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """Sensor and actuator: row and row, null and row, row and null, null and null."""
        pairs = case.pairs
        v, seen = case.subspace.basis.double().cpu(), pairs.read_space.rows.basis
        row = v @ seen.T @ seen
        parts, d = (row, v - row), pairs.difference.double()
        return [pairs.moved((d @ sensor.T @ actuator).float()) for actuator in parts for sensor in parts]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The cross term's share."""
        pairs = case.pairs
        own, cross, *rest = (f"{float(share):.0%}" for share in pairs.shares(values).mean(1))
        basis = case.subspace.basis.double().cpu()
        estimate = cross_share(basis, pairs.read_space.rows, pairs.difference.double(), exact=pairs.read_space.exact)
        note = (
            f"{estimate:.0%} of what the reader gets is transferred from where it does not look (faithful near 0%, "
            f"illusions near 100%); run by themselves: read and acted out by the visible part {own}, read by the "
            f"invisible part and acted out by the visible one {cross}, acted out by the invisible part {rest[0]} and "
            f"{rest[1]}; reader: {pairs.read_space}"
        )
        claim = "what acts is moved by what the model itself reads"
        verdict = "supported" if estimate < 0.5 else "inconclusive"
        return [Finding("mechanism.ledger", claim, estimate, None, None, len(pairs), verdict, note=note)]


def cross_share(
    basis: Float[Tensor, "k d"], reader: RowSpace, difference: Float[Tensor, "rows d"], *, exact: bool = True
) -> float:
    """CTF = <y_cross, y> / <y, y> summed over rows, for a linear reader given by its row space and gains.

    Args:
        exact: whether the gains are those of a matrix; else every visible direction counts the same.
    """
    gains = reader.singular_values[: reader.rank] if exact else reader.singular_values.new_ones(reader.rank)
    inside = basis.to(reader.basis) @ reader.basis.T  # V in the reader's coordinates, k x r
    moved = difference.to(reader.basis)
    whole = moved @ basis.to(reader.basis).T
    own = moved @ reader.basis.T @ inside.T
    y, crossed = (whole @ inside) * gains, ((whole - own) @ inside) * gains
    return float((crossed * y).sum() / y.square().sum().clamp(min=1e-300))
