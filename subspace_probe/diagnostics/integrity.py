"""Did the intervention do what it says, and only that?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.edits import EditContext
from subspace_probe.core.findings import Finding
from subspace_probe.core.protocols import Intervention
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.diagnostics.cases import Case
from subspace_probe.interventions.conditions import Condition


def _untouched(x: Tensor, ctx: EditContext) -> Tensor:
    return x.clone()


@final
@dataclass(frozen=True, eq=False)
class _Nothing:
    """The same sites written with the value just read: must change nothing at all."""

    of: Intervention

    @property
    def subspace(self) -> Subspace:
        return self.of.subspace

    @property
    def where(self) -> Where:
        return self.of.where

    def edits(self, n_layers: int) -> dict:  # pyright: ignore[reportMissingTypeArgument, reportUnknownParameterType]
        return {site: _untouched for site in self.of.edits(n_layers)}

    def with_subspace(self, subspace: Subspace) -> "_Nothing":
        return replace(self, of=self.of.with_subspace(subspace))


@final
@dataclass(frozen=True)
class Integrity:
    """Writing back the value just read changes nothing, and the edit moves what it selects.

    Estimate: the largest change of the metric under a write of the very value read; must be exactly 0. The note says
    how far the real edit moves the states it selects, relative to their norm. A site that does not fire, an edit of
    another shape and non-finite values raise before this check is reached.
    """

    name: ClassVar[str] = "integrity"
    question: ClassVar[str] = "Did the hooks fire where they should, and change nothing else?"

    def missing(self, case: Case) -> str:
        """Applies to every intervention."""
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """One condition: the identity write."""
        return [_Nothing(case.intervention)]

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The identity write against the clean run."""
        worst = float((values[0] - case.clean).abs().max())
        verdict = "supported" if worst == 0.0 else "refuted"
        moved = _relative_move(case)
        note = (
            f"an identity write changes the metric by {worst:.2g}; the edit moves states by {moved:.2f} of their norm"
        )
        claim = "an identity write at the same sites changes nothing"
        return [Finding("control.integrity", claim, worst, n=len(case.contrast), verdict=verdict, note=note)]


def _relative_move(case: Case) -> float:
    """Median size of the edit at its first site, relative to the norm of the states it selects."""
    site, edit = min(case.intervention.edits(case.model.spec.n_layers).items(), key=lambda item: item[0].order)
    batch = case.model.tokens(case.contrast.prompts[:16])
    x = case.model.run(batch, reads=[site], stop_after=site).reads[site]
    ctx = EditContext(batch, batch.positions, batch.mask)
    size = ((edit(x, ctx) - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12))[batch.mask]
    touched = size[size > 0]
    return float(touched.median()) if len(touched) else float(torch.zeros(()))
