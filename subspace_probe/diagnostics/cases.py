"""What a check is given: one intervention, the prompts and metric it is judged by, and what it takes to refit it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, PositionError, SiteError
from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.intervals import mean_of
from subspace_probe.core.protocols import Finder, Intervention, Metric
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.diagnostics.natural import Natural
from subspace_probe.finders import MODEL_FINDERS
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


def place_of(model: HookedModel, intervention: Intervention) -> tuple[Site, Where]:
    """The site and the tokens at which an intervention's subspace is claimed to be what the model uses.

    Where it acts at several sites, that is where the subspace was found; where it acts on many tokens, the one token
    the subspace was found at.

    Raises:
        SiteError: it acts at several sites, and the subspace does not say where it was found.
    """
    subspace, n_layers = subspace_of(intervention), model.spec.n_layers
    sites = sorted(intervention.edits(n_layers), key=lambda site: site.order)
    found = subspace.site.resolve(n_layers) if subspace.site else None
    if len(sites) > 1 and found is None:
        raise SiteError(
            f"{intervention!r} acts at {len(sites)} sites, and its subspace does not say at which it was found. Use "
            "subspace.moved(site)."
        )
    where = intervention.where
    if not where.single and subspace.where is not None:
        where = subspace.where
    return (sites[0] if len(sites) == 1 or found is None else found), where


Line = Literal["control", "mechanism"]
"""The two verdicts of an audit: does it control the behaviour; is it what the model itself uses?"""
Prompts = Literal["contrast", "natural"]
"""What a check's conditions are run on: the prompts under audit, or the natural pairs."""


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
        natural: pairs between which the variable differs, with the model's own states at the subspace's site.
        no_natural: why there are none.
        rerouted: prompts (label 0), each with the one that replaces it to move its states (label 1).
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
    natural: Natural | None = None
    no_natural: str = "audit was given no natural pairs (natural=...)."
    rerouted: Contrast | None = None
    seed: int = 0
    clean: Float[Tensor, " n"] = field(default_factory=lambda: torch.empty(0))
    edited: Float[Tensor, " n"] = field(default_factory=lambda: torch.empty(0))

    @property
    def subspace(self) -> Subspace:
        """The subspace under audit."""
        return subspace_of(self.intervention)

    @property
    def pairs(self) -> Natural:
        """The natural pairs, of which a check's `missing` has made sure."""
        if self.natural is None:
            raise ConfigError(f"A check needs natural pairs, but {self.no_natural}")
        return self.natural

    @property
    def no_refit(self) -> str:
        """Why the subspace cannot be found again from activations; empty where it can."""
        if self.whole or (self.finder and self.acts and self.finder.name not in MODEL_FINDERS):
            return self.whole
        if self.finder and self.acts:
            return f"{self.finder.name} needs the model to find a subspace again; see trained_nulls."
        return "audit was not told how the subspace was found (refit=...)."

    @property
    def whole(self) -> str:
        """Why checks that need a subspace do not apply; empty where there is one."""
        return "" if self.intervention.subspace is not None else "it edits whole states and has no subspace to compare."

    def effect(self) -> tuple[float, Interval]:
        """Mean change of the metric, with its interval by group."""
        return mean_of(self.edited - self.clean, self.contrast.groups, seed=self.seed)

    def finding(self, name: str, claim: str, *, null: Interval | None, note: str = "") -> Finding:
        """A finding about the mean effect, judged against a null of it."""
        estimate, interval = self.effect()
        if not note:
            note = f"mean change {estimate:+.3g}, from {interval.low:+.3g} to {interval.high:+.3g}"
            note += f"; {null.of}: {null.low:+.3g} to {null.high:+.3g}" if null else ""
        found = Finding(f"control.{name}", claim, estimate, interval, null, len(self.contrast), note=note)
        return found.judged("beyond", margin=self.margin)

    def untested(self, check: "CaseCheck", reason: str) -> Finding:
        """A finding that says why there is none."""
        return Finding(f"{check.line}.{check.name}", check.question, float("nan"), verdict="not tested", note=reason)


def with_natural(
    case: Case, contrast: Contrast, place: Callable[[HookedModel, Intervention], tuple[Site, Where]], pairs: int
) -> Case:
    """The case with natural pairs at the intervention's place, or with the reason why it has none."""
    try:
        site, where = place(case.model, case.intervention)
        return replace(case, natural=Natural(case.model, contrast, site, where, case.metric, pairs=pairs))
    except (DataError, PositionError, SiteError) as error:
        return replace(case, no_natural=str(error))


@runtime_checkable
class CaseCheck(Protocol):
    """One question about an intervention; to be inherited from.

    `missing` says why it does not apply, or nothing. `conditions` says what to run, on the prompts that `on` names;
    audit runs the conditions of all checks in shared passes and hands each check its own rows, metric values of shape
    [condition, n]. `passes` estimates what `read` runs besides, in prompts run once.

    Attributes:
        name: its findings are called by it: `control.random`, `mechanism.containment`.
        line: which of the two verdicts it speaks to.
        question: one sentence.
        on: what its conditions are run on.
    """

    name: ClassVar[str]
    line: ClassVar[Line] = "control"
    question: ClassVar[str]
    on: ClassVar[Prompts] = "contrast"

    def missing(self, case: Case) -> str: ...
    def conditions(self, case: Case) -> Sequence[Condition]: ...
    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]: ...

    def passes(self, case: Case) -> float:
        """Prompts that `read` runs beside the conditions, in whole passes."""
        return 0.0

    def frugal(self) -> "CaseCheck":
        """The same with as few draws as a verdict needs, for audits with a budget."""
        return self
