"""Did the intervention do what it says, and only that?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.edits import EditContext, needs_of
from subspace_probe.core.findings import Finding
from subspace_probe.core.protocols import Intervention
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.diagnostics.rewritten import Rewritten
from subspace_probe.interventions.conditions import Condition


def _untouched(x: Tensor, ctx: EditContext) -> Tensor:
    return x.clone()


def _nothing(intervention: Intervention) -> Condition:
    """The same sites written with the value just read: must change nothing at all."""
    return Rewritten(intervention, lambda edits: dict.fromkeys(edits, _untouched))


@final
@dataclass(frozen=True)
class Integrity(CaseCheck):
    """Writing back the value just read changes nothing; the edit moves what it selects, and nothing else.

    Estimate: the largest change of the metric under a write of the very value read; 0 up to rounding. Refuted too where
    the edit moves no selected state (a strength of 0, a rule that never holds), or one that it does not select. A site
    that does not fire, an edit of another shape and non-finite values raise before this check is reached.
    """

    name: ClassVar[str] = "integrity"
    question: ClassVar[str] = "Did the hooks fire where they should, and change nothing else?"

    def missing(self, case: Case) -> str:
        """Applies to every intervention."""
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """One condition: the identity write."""
        return [_nothing(case.intervention)]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The identity write against the clean run; and what the edit itself moves."""
        worst = float((values[0] - case.clean).abs().max())
        moved, beside = _moves(case)
        # conditions are rows of one batch, whose order of sums may differ on an accelerator; never by more than this
        clean = worst <= 1e-4 * (1 + float(case.clean.abs().max()))
        verdict = "supported" if clean and moved > 0 and beside == 0 else "refuted"
        note = (
            f"an identity write changes the metric by {worst:.2g}; the edit moves the states it selects by {moved:.2f} "
            f"of their norm and all others by {beside:.2g}"
        )
        claim = "an identity write changes nothing, and the edit moves the selected tokens and no others"
        return [Finding("control.integrity", claim, worst, n=len(case.contrast), verdict=verdict, note=note)]


def _moves(case: Case) -> tuple[float, float]:
    """Median relative size of the edit at its first site on the tokens it selects; largest size on all others."""
    site, edit = min(case.intervention.edits(case.model.spec.n_layers).items(), key=lambda item: item[0].order)
    batch = case.model.tokens(case.contrast.prompts[:16])
    needed = {source for source, _ in needs_of(edit)}
    reads = case.model.run(batch, reads=[site, *needed], stop_after=site).reads
    x, batch = reads[site], batch.to(reads[site].device)
    ctx = EditContext(batch, batch.positions, batch.mask, reads={source: reads[source] for source in needed})
    size = (edit(x, ctx) - x).norm(dim=-1)
    selected = ctx.select(case.intervention.where)
    # where a rule decides, most of the tokens may be left alone
    counted = selected & (size > 0) if needed else selected
    relative = (size / x.norm(dim=-1).clamp(min=1e-12))[counted]
    others = size[batch.mask & ~selected]
    return float(relative.median()) if len(relative) else 0.0, float(others.max()) if len(others) else 0.0
