"""What a check is given: one intervention, the prompts and metric it is judged by, and what it takes to refit it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.intervals import mean_of
from subspace_probe.core.protocols import Finder, Intervention, Metric
from subspace_probe.core.subspaces import Subspace
from subspace_probe.interventions.conditions import Condition
from subspace_probe.models.hooked import HookedModel


def subspace_of(intervention: Intervention) -> Subspace:
    """The subspace an intervention acts on.

    Raises:
        ConfigError: it acts on whole states, to which no random or refitted subspace can be compared.
    """
    if intervention.subspace is None:
        raise ConfigError(
            f"{intervention!r} edits whole states, so there is no subspace to audit. Give it one, or use measure."
        )
    return intervention.subspace


@final
@dataclass(frozen=True, eq=False)
class Case:
    """One intervention under audit.

    Attributes:
        contrast: the prompts it is judged on.
        clean: the metric without it, shape [n].
        edited: the metric with it, shape [n].
        finder: what found the subspace, so that checks can find it again; with `acts`, what it was fitted on.
        neutral: prompts whose behaviour should not change.
        margin: half-width of "no effect", in units of the metric.
    """

    model: HookedModel
    intervention: Intervention
    contrast: Contrast
    metric: Metric
    metric_name: str
    margin: float
    finder: Finder | None = None
    acts: Activations | None = None
    neutral: Contrast | None = None
    seed: int = 0
    clean: Float[Tensor, " n"] = field(default_factory=lambda: torch.empty(0))
    edited: Float[Tensor, " n"] = field(default_factory=lambda: torch.empty(0))

    @property
    def subspace(self) -> Subspace:
        """The subspace under audit."""
        return subspace_of(self.intervention)

    def effect(self) -> tuple[float, Interval]:
        """Mean change of the metric, with its interval by group."""
        return mean_of(self.edited - self.clean, self.contrast.groups, seed=self.seed)

    def finding(self, name: str, claim: str, *, null: Interval | None, note: str = "") -> Finding:
        """A finding about the mean effect, judged against a null of it."""
        estimate, interval = self.effect()
        found = Finding(f"control.{name}", claim, estimate, interval, null, len(self.contrast), note=note)
        return found.judged("beyond", margin=self.margin)

    def untested(self, name: str, claim: str, reason: str) -> Finding:
        """A finding that says why there is none."""
        return Finding(f"control.{name}", claim, float("nan"), verdict="not tested", note=reason)


@runtime_checkable
class CaseCheck(Protocol):
    """One question about an intervention.

    `conditions` says what to run; audit runs the conditions of all checks in shared passes and hands each check its
    own rows, metric values of shape [condition, n].
    """

    name: ClassVar[str]
    question: ClassVar[str]

    def missing(self, case: Case) -> str: ...
    def conditions(self, case: Case) -> Sequence[Condition]: ...
    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]: ...
