"""Would any direction of the same length do it, to first order?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import range_of
from subspace_probe.core.protocols import Intervention
from subspace_probe.core.sites import Site
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.interventions.ablate import Ablate
from subspace_probe.interventions.conditions import Condition
from subspace_probe.interventions.gradients import metric_gradients
from subspace_probe.interventions.patch import Patch
from subspace_probe.interventions.steer import Steer
from subspace_probe.linalg.bases import random_directions

Predicted = Callable[[Float[Tensor, "draw k d"]], Float[Tensor, " draw"]]
"""The mean effect of the intervention along each of some subspaces, to first order."""
_CHUNK = 250
"""Subspaces held in memory at a time."""


@final
@dataclass(frozen=True)
class FirstOrder(CaseCheck):
    """The effect of random subspaces of the same rank and step, predicted from one gradient pass: sum of G . change.

    G is the metric's gradient at the states where the intervention acts, and the change what it would add there: the
    step for steering, P (source - x) for an exchange, -P x for ablation. For an exchange
    of D along uniformly random unit directions that has mean D.G / d and second moment (|D|^2 |G|^2 + 2 (D.G)^2) /
    (d (d + 2)), by the moments of the sphere; thousands are drawn, which costs no pass.

    Honest only where first order holds: `run` random directions are really run, and the root mean square error of their
    predicted effects must be at most `tolerance` of their own root mean square (or of the margin of no effect); else it
    is not tested. The null is widened by the largest error. Null: the predicted effects. A real direction lies outside;
    what any push of that length does lies inside. Applies to steering without a rule, exchange within a subspace and
    ablation, at one site. Cannot see a direction that works without being the model's own.
    """

    name: ClassVar[str] = "first_order"
    question: ClassVar[str] = "Would a random direction of the same length do the same, to first order?"

    draws: int = 2000
    run: int = 4
    tolerance: float = 0.5

    def missing(self, case: Case) -> str:
        """Needs a change that is known beforehand, at one site."""
        if case.whole:
            return case.whole
        edit = case.intervention
        known = isinstance(edit, Ablate | Patch) or (isinstance(edit, Steer) and edit.when is None)
        if not known or (isinstance(edit, Steer) and edit.keep_norm):
            return "what it adds depends on more than the state and the subspace."
        if len(edit.edits(case.model.spec.n_layers)) != 1:
            return "it acts at several sites, whose effects do not simply add up."
        if isinstance(edit, Ablate) and edit.to is not None and edit.to.prompt is not None:
            return "it puts in other prompts' states token by token; audit the Patch that does."
        if isinstance(edit, Patch) and edit.align not in (None, "repeat"):
            return "its source has other numbers of tokens than the prompts."
        return ""

    def conditions(self, case: Case) -> Sequence[Condition]:
        """A few random directions, really run."""
        return [case.intervention.with_subspace(random_like(case.subspace, seed=seed)) for seed in self._seeds(case)]

    def passes(self, case: Case) -> int:
        """States, then gradients; a backward pass counted as two forward ones."""
        return 4 * len(case.contrast)

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """The effect against predicted random ones, if the prediction holds for those that were run."""
        try:
            predicted = prediction(case)
        except ConfigError as error:  # a metric without a gradient
            return [case.untested(self, str(error))]
        rank, width = case.subspace.rank, case.subspace.width
        tried = torch.stack([random_like(case.subspace, seed=seed).basis.double() for seed in self._seeds(case)])
        measured = (values - case.clean).mean(1)
        said = predicted(tried.cpu())
        # of their own size, not of the null's: where nothing is linear the null is wide, and anything lies within it
        size = max(float(said.square().mean().sqrt()), float(measured.square().mean().sqrt()), case.margin)
        wrong = float((said - measured).square().mean().sqrt())
        parts = [predicted(_frames(_CHUNK, rank, width, case.seed + part)) for part in range(self.draws // _CHUNK)]
        null = range_of(torch.cat(parts), f"{len(parts) * _CHUNK} random directions, to first order")
        note = f"effects of {self.run} random directions that were run are predicted to {wrong:.2g}, their size is "
        note += f"{size:.2g} (predicted range {null.low:+.2g} to {null.high:+.2g})"
        if wrong > self.tolerance * size:
            return [case.untested(self, f"first order does not hold at this length: {note}.")]
        wrong = float((said - measured).abs().max())
        null = replace(null, low=null.low - wrong, high=null.high + wrong)
        claim = "the effect is beyond that of random directions of the same length, to first order"
        return [case.finding(self.name, claim, null=null, note=note)]

    def _seeds(self, case: Case) -> range:
        return range(case.seed + 5000, case.seed + 5000 + self.run)


def prediction(case: Case) -> Predicted:
    """The mean effect of the intervention along other subspaces, to first order.

    Raises:
        ConfigError: a metric without a gradient.
    """
    edit, n = case.intervention, len(case.contrast)
    (site,) = edit.edits(case.model.spec.n_layers)
    states = case.model.capture(case.contrast, sites=[site], where=edit.where)
    x, prompt = states.at(site).double().cpu(), states.prompt.cpu()
    g = metric_gradients(case.model, case.contrast.prompts, site, edit.where, case.metric).double()
    if isinstance(edit, Steer):
        amount = torch.tensor(edit.strengths, dtype=torch.float64)
        amount = amount[prompt] if len(amount) > 1 else amount.expand(len(x))
        scale = case.subspace.scale.double().cpu()
        if edit.unit != "scale":
            scale = scale / scale.norm()
        if edit.unit == "norm":
            amount = amount * x.norm(dim=1)
        pull = (amount[:, None] * g).sum(0) / n
        return lambda bases: (scale @ bases) @ pull
    change = _exchanged(edit, site, case.model.spec.n_layers, x, prompt)
    inner = change.T @ g / n
    whole = float((change * g).sum()) / n if isinstance(edit, Patch) and edit.outside else None

    def quadratic(bases: Float[Tensor, "draw k d"]) -> Float[Tensor, " draw"]:
        inside = ((bases @ inner) * bases).sum((1, 2))
        return inside if whole is None else whole - inside

    return quadratic


def _exchanged(edit: Intervention, site: Site, n_layers: int, x: Tensor, prompt: Tensor) -> Tensor:
    """What a patch or an ablation would add, were the subspace everything."""
    source = edit.source if isinstance(edit, Patch) else edit.to if isinstance(edit, Ablate) else None
    if source is None:
        return -x
    given = source.resolve(n_layers).states[site].double().cpu()
    if source.prompt is None:
        return given - x
    return (given[prompt] if len(given) != len(x) else given) - x


def _frames(n: int, k: int, d: int, seed: int) -> Float[Tensor, "n k d"]:
    """Uniformly random frames."""
    drawn = random_directions(n * k, d, seed=seed + 6000, dtype=torch.float64).view(n, k, d)
    if k == 1:
        return drawn
    q, r = torch.linalg.qr(drawn.mT)
    signs = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
    return (q * signs[:, None].double()).mT
