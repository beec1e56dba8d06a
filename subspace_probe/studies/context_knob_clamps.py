"""The clamp of the study on the context knob: constants chosen on prompts of their own, then used on others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Expectation, Finding, judge_absence
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST
from subspace_probe.diagnostics.knob_controls import orthogonal_clamps
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.interventions.knob import KnobClamp
from subspace_probe.metrics.answers import Accuracy
from subspace_probe.metrics.pairs import Pairs
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.context_knob_prompts import Prompts

MARGIN = 0.1
"""Half-width of "no effect" on a rate: stated beforehand, the same everywhere."""
LOSS = 0.03
"""Accuracy on other prompts that may be lost."""
_FEW = 5
"""Orthogonal directions beside the knob in the sweep over constants."""


@runtime_checkable
class Settings(Protocol):
    """What the clamp needs of the study's settings."""

    @property
    def strengths(self) -> tuple[float, ...]: ...
    @property
    def draws(self) -> int: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Knob:
    """A direction with its two constants.

    Attributes:
        values: the coordinate for the prior and for the context.
        strength: how far they lie from the middle of the class means, in gaps.
        draws: rows of the null figure, by the name of the finding they belong to.
    """

    direction: Subspace
    values: tuple[float, float]
    strength: float
    draws: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict[str, Sequence[Mapping[str, Any]]])

    def clamp(self, contrast: Contrast) -> KnobClamp:
        """Every prompt set to the constant of its label."""
        values = torch.tensor([self.values[label] for label in contrast.labels])
        return KnobClamp(self.direction, values, where=LAST)


def calibrated(
    model: HookedModel, direction: Subspace, data: Prompts, config: Settings
) -> tuple[Knob, list[dict[str, Any]]]:
    """The constants that turn most pairs of validation prompts without an intent, and the whole sweep.

    They lie on both sides of the middle of the class means. Where several strengths turn as many pairs, the middle one
    is taken, which lies farthest from where they stop doing so.

    Returns:
        the knob, and a row for each strength: of the knob, and of directions orthogonal to it that move as far.
    """
    acts = model.capture(data.train, sites=direction.site or [], where=LAST)
    coords = acts.at(acts.sites[0]).double().cpu() @ direction.unit.double()
    prior, context = (float(coords[acts.labels == label].mean()) for label in (0, 1))
    middle, gap = (prior + context) / 2, context - prior
    unstated = data.under(data.validation, "none")
    knobs = [Knob(direction, (middle - s * gap, middle + s * gap), s) for s in config.strengths]
    states = _states(model, unstated, direction)
    controls = [orthogonal_clamps(k.clamp(unstated), states, _FEW, seed=config.seed) for k in knobs]
    every = [c for knob, others in zip(knobs, controls, strict=True) for c in (knob.clamp(unstated), *others)]
    pairs = Pairs.of(unstated)
    both = _pair_accuracy(model, unstated, every).reshape(len(knobs), 1 + _FEW, len(pairs))
    rows: list[dict[str, Any]] = []
    for number, knob in enumerate(knobs):
        for name, values in (("knob", both[number, 0]), ("orthogonal", both[number, 1:].mean(0))):
            rate, spread = mean_of(values, pairs.groups, seed=config.seed)
            ends = {"low": spread.low, "high": spread.high}
            of = {"direction": name, "behaviour": "pairs right both ways", "strength": knob.strength}
            rows.append({**of, "rate": rate, **ends, "prior": knob.values[0], "context": knob.values[1]})
    rates = both[:, 0].mean(1)
    good = (rates >= rates.max() - 1e-9).nonzero().flatten()
    return knobs[int(good[len(good) // 2])], rows


def sweep_rows(sweep: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sweep as the figure of strengths reads it, strengths ascending."""
    return sorted((dict(row) for row in sweep), key=lambda row: (row["direction"], row["strength"]))


def clamp_findings(
    model: HookedModel | None,
    knob: Knob,
    data: Prompts,
    truth: str,
    config: Settings,
    *,
    name: str = "tuned",
) -> list[Finding]:
    """Pair accuracy without an intent, the knob turned; beside it directions orthogonal to it that move as far.

    Args:
        model: None where there is none to try it on.
        truth: where an organism takes up the intent; the base's figures are expected where it is the last token.
        name: "tuned", or "base" for a model in which the knob was not found.
    """
    claim = f"the {name} model answers pairs both ways without an intent, the knob turned"
    if model is None:
        return [Finding(f"{name}.clamped", claim, float("nan"), verdict="not tested", note="no untuned model given")]
    unstated = data.under(data.test, "none")
    subspace = knob.direction if name == "tuned" else knob.direction.for_any_model()
    clamp = replace(knob, direction=subspace).clamp(unstated)
    others = orthogonal_clamps(clamp, _states(model, unstated, subspace), config.draws, seed=config.seed)
    scores = _pair_accuracy(model, unstated, [None, clamp, *others])
    pairs, n = Pairs.of(unstated), len(unstated)
    estimate, interval = mean_of(scores[1], pairs.groups, seed=config.seed)
    drawn = scores[2:].mean(1)
    null = range_of(drawn, f"{len(drawn)} orthogonal directions that move as far")
    high = float(drawn.quantile(0.95))
    bound = {"tuned": {"last": Expectation(above=0.95), "earlier": Expectation(below=0.05)},
             "base": {"last": Expectation(above=0.90)}}  # fmt: skip
    note = f"{float(scores[0].mean()):.3f} without the knob; orthogonal directions {float(drawn.mean()):.3f} on average"
    found = Finding(f"{name}.clamped", claim, estimate, interval, null, n, expected=bound[name].get(truth), note=note)
    knob.draws[found.name] = [
        {"direction": "knob", "behaviour": f"{name} model, pairs right both ways", "kind": kind, "value": value}
        for kind, values in (("orthogonal direction", drawn.tolist()), ("observed", [estimate]))
        for value in values
    ]
    lead = replace(interval, low=interval.low - high, high=interval.high - high)
    around = replace(null, low=null.low - high, high=null.high - high)
    claim = f"in the {name} model the knob leads the 95th percentile of orthogonal directions"
    least = Expectation(above=0.30) if truth == "last" and name == "tuned" else None
    ahead = Finding(f"{name}.lead", claim, estimate - high, lead, around, n, expected=least)
    ahead = replace(ahead, note=f"their 95th percentile is {high:.3f}").judged("above", margin=MARGIN)
    return [found.judged("above", margin=MARGIN), ahead, *_gain(model, scores[1], drawn, data, truth, config, name)]


def _gain(
    model: HookedModel, clamped: Tensor, drawn: Tensor, data: Prompts, truth: str, config: Settings, name: str
) -> list[Finding]:
    """What turning the knob is better than writing the intent."""
    pairs = Pairs.of(data.test)
    written = _pair_accuracy(model, data.test, [None])[0]
    estimate, interval = mean_of(clamped - written, pairs.groups, seed=config.seed)
    null = range_of(drawn - float(written.mean()), f"{len(drawn)} orthogonal directions that move as far")
    expected = Expectation(above=0.15) if truth == "last" and name == "base" else None
    claim = f"in the {name} model turning the knob does more than writing the intent"
    note = f"pair accuracy with the written intent {float(written.mean()):.3f}"
    found = Finding(f"{name}.gain", claim, estimate, interval, null, len(data.test), expected=expected, note=note)
    found = found.judged("above", margin=0.05)
    # better than random directions is not better than the written intent
    wrong = found.verdict == "supported" and interval.low <= 0
    return [replace(found, verdict="inconclusive") if wrong else found]


def specificity(model: HookedModel, knob: Knob, data: Prompts, seed: int) -> list[Finding]:
    """What the knob costs on prompts that it must not touch, at either constant: accuracy."""
    found: list[Finding] = []
    for name, value in zip(("prior", "context"), knob.values, strict=True):
        claim = f"set to {name}, the knob leaves the answers to other prompts alone"
        if data.others is None:
            note = "no prompts are given that it should not touch"
            found.append(Finding(f"specificity.{name}", claim, float("nan"), verdict="not tested", note=note))
            continue
        clamp = KnobClamp(knob.direction, value, where=LAST)
        others = orthogonal_clamps(clamp, _states(model, data.others, knob.direction), 40, seed=seed)
        right = outcomes(model, data.others.prompts, [None, clamp, *others], [Accuracy(model)])[0]
        # what is lost, not what is gained: where nothing changes, the interval is Wilson's, on the side of loss
        lost, around = mean_of(right[0] - right[1], data.others.groups, seed=seed)
        null = range_of((right[2:] - right[0]).mean(1), "40 orthogonal directions that move as far")
        interval = replace(around, low=0.0 - around.high, high=0.0 - around.low)
        verdict = judge_absence(interval, margin=LOSS)
        note = f"accuracy {float(right[0].mean()):.3f} before, {float(right[1].mean()):.3f} after"
        n = len(data.others)
        found.append(Finding(f"specificity.{name}", claim, 0.0 - lost, interval, null, n, verdict, note=note))
    return found


def _states(model: HookedModel, contrast: Contrast, direction: Subspace) -> Float[Tensor, "n d"]:
    acts = model.capture(contrast, sites=direction.site or [], where=LAST)
    return acts.at(acts.sites[0])


def _pair_accuracy(
    model: HookedModel, contrast: Contrast, conditions: Sequence[Condition]
) -> Float[Tensor, "condition p"]:
    return Pairs.of(contrast).accuracy(outcomes(model, contrast.prompts, conditions, [Accuracy(model)])[0])
