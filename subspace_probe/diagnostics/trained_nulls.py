"""Would training have found something as strong where there is nothing to find?"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import DataError, PositionError, SiteError
from subspace_probe.core.findings import Finding, Verdict
from subspace_probe.core.intervals import range_of
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.finders.das import DAS
from subspace_probe.finders.interchange import Interchange
from subspace_probe.finders.interchange_training import Schedule, linearised, train
from subspace_probe.interventions.conditions import Condition, outcomes

TRAINED = (DAS.name,)
"""Finders that train by interchange, and so can be trained on nothing."""


@final
@dataclass(frozen=True)
class TrainedNulls(CaseCheck):
    """A trained subspace against subspaces trained as long, by the same settings, where they should find nothing.

    Two kinds, `draws` of each, from linearised and random starts: *shuffled*, trained to carry values of the variable
    that were handed out anew (Arora et al. 2024, arXiv:2402.12560), and *elsewhere*, trained to carry the true values
    in the orthogonal complement of the subspace and of the leading principal components, where success is a shortcut
    that the site hosts (Liu & Chen: 12 to 26 % of them, all through planted pathways, and at most 1.3 % in GPT-2
    without its first 32 components, but 12.3 % without the first four). Each is then exchanged between the natural
    pairs.

    Estimate: the share of the partners' difference that the subspace brings about. Null: the range of the trained ones;
    with few of them the largest counts. Refuted where it reaches the subspace's interval: training alone explains the
    effect; supported where the subspace lies above all of them. Random directions are no fair opponent of a trained
    one. Measured at a residual state that carries the variable: .99 against .56 to .60 for shuffled values (whose
    linearised start finds some of the true direction) and 0 elsewhere; where a site hosts illusions, the second kind
    should reach the subspace. Applies to subspaces found by training, given what they were trained on (`refit`). Cannot
    see a dormant pathway that carries the true values in the subspace itself: see containment.
    """

    name: ClassVar[str] = "trained_nulls"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Would training have found something as strong where there is nothing to find?"
    on: ClassVar[Prompts] = "natural"

    draws: int = 3
    components: int = 32

    def missing(self, case: Case) -> str:
        """Needs a trained subspace, and what it was trained on."""
        if case.whole:
            return case.whole
        finder = case.subspace.notes.get("finder")
        if finder not in TRAINED:
            return f"the subspace was not trained (finder: {finder}), so random directions are fair opponents."
        if case.acts is None or case.subspace.site is None or case.subspace.where is None:
            return "audit was not told on what the subspace was trained (refit=...)."
        if not case.subspace.where.single:
            return f"interchange is trained at one token, not at {case.subspace.where}."
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """The subspace."""
        return [case.pairs.moved(case.pairs.within(case.subspace))]

    def passes(self, case: Case) -> int:
        """Training, with a backward pass counted as two forward ones, and the exchange of what was found."""
        das = _settings(case)
        return 2 * self.draws * (3 * das.steps * das.batch_size + len(case.pairs))

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The subspace's effect against theirs."""
        pairs = case.pairs
        try:
            shuffled, apart = self._trained(case)
        except (DataError, PositionError, SiteError) as error:  # prompts without answers, a site that nothing reads
            return [case.untested(self, str(error))]
        patches = [pairs.moved(pairs.along(basis.cpu())) for basis in (*shuffled, *apart)]
        found = outcomes(case.model, pairs.prompts.prompts, patches, [case.metric])[0]
        reached = pairs.shares(found).mean(1)
        estimate, interval = pairs.share_of(values[0], seed=case.seed)
        said = [", ".join(f"{float(share):.0%}" for share in part) for part in reached.split(self.draws)]
        note = f"exchanging it moves {estimate:.0%} of the difference; subspaces trained as long on shuffled values "
        note += f"{said[0]}; trained outside of it and of the leading {self._kept(case)} principal components {said[1]}"
        largest = float(reached.max())
        verdict: Verdict = "inconclusive"
        if largest >= interval.low:
            verdict = "refuted"
        elif estimate > 0:
            verdict = "supported"
        null = range_of(reached, f"{len(reached)} subspaces trained on nothing")
        claim = "the effect is above what the same training finds where there is nothing to find"
        return [Finding("mechanism.trained_nulls", claim, estimate, interval, null, len(pairs), verdict, note=note)]

    def _kept(self, case: Case) -> int:
        return min(self.components, case.subspace.width // 4)

    def _trained(self, case: Case) -> tuple[Float[Tensor, "draw k d"], Float[Tensor, "draw k d"]]:
        """Both kinds."""
        if case.acts is None or case.subspace.site is None or case.subspace.where is None:
            raise DataError("What the subspace was trained on is not known. Pass refit=...")
        das, contrast, rank = _settings(case), case.acts.contrast, case.subspace.rank
        rows = contrast.split_rows(das.holdout, seed=das.seed)[1]
        shown = torch.randperm(len(rows), generator=torch.Generator().manual_seed(das.seed)).tolist()
        bases = [rows[i] for i in shown]
        site, where = case.subspace.site, case.subspace.where
        task = Interchange(case.model, contrast, site, where, bases, batch_size=das.batch_size)
        schedule = Schedule(das.steps, das.lr, das.same, None, das.seed + 1)
        drawn = torch.Generator().manual_seed(case.seed + 7000)
        true = task.labels.repeat(self.draws, 1)
        labels = torch.stack([row[torch.randperm(len(row), generator=drawn)] for row in true])
        starts = [linearised(task, rank, labels=row, seed=das.seed) for row in labels]
        shuffled = train(schedule, task, labels, torch.stack(starts)).bases
        states = task.states.double().cpu()[task.bases]
        axes = torch.linalg.svd(states - states.mean(0), full_matrices=False)[2][: self._kept(case)]
        away = torch.linalg.qr(torch.cat([case.subspace.basis.double().cpu(), axes]).T)[0].T.float()
        first = linearised(task, rank, seed=das.seed).cpu()
        random = torch.randn(self.draws - 1, *first.shape, generator=drawn)
        return shuffled, train(schedule, task, true, torch.cat([first[None], random]), away=away).bases


def _settings(case: Case) -> DAS:
    """What the subspace says it was trained with; controls and boundary are not repeated."""
    noted = cast("dict[str, Any]", case.subspace.notes.get("settings") or {})
    known = {field.name for field in fields(DAS)} - {"controls", "boundary", "rank"}
    return DAS(rank=case.subspace.rank, **{name: value for name, value in noted.items() if name in known})
