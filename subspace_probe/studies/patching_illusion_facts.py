"""Factual recall in the study of illusions: a direction of an MLP for each pair, and the edit that equals it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Expectation, Finding, Interval, judge_absence
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import PROMPT, Where
from subspace_probe.diagnostics.read_space import weight_read_space
from subspace_probe.finders.interchange import Interchange
from subspace_probe.finders.pair_directions import pair_directions
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.interventions.patch import Patch
from subspace_probe.interventions.sources import Source
from subspace_probe.interventions.weight_edit import WeightEdit
from subspace_probe.linalg.rank_one_edits import edit_of_patch
from subspace_probe.models.hooked import HookedModel
from subspace_probe.models.reading import readers

RIDGE = 1e-4
"""Of the second moment of an MLP's states, as a share of their mean square: some units may never fire."""
ARMS = ("one direction a pair", "its read part", "whole MLP", "equivalent edit", "random direction")


def fact_findings(
    model: HookedModel, facts: Contrast, where: Where, *, steps: int, seed: int, expected: Expectation | None,
    progress: bool,
) -> tuple[list[Finding], list[dict[str, Any]]]:  # fmt: skip
    """Every layer's MLP at the subject's token.

    Raises:
        ConfigError: a family that norms an MLP's output, whose edits would not be edits of a weight.
    """
    del progress
    if model.backend.layout.post_norm:
        raise ConfigError(f"{model.spec.family} norms an MLP's output before it is added. Leave facts empty.")
    findings: list[Finding] = []
    rows: list[dict[str, Any]] = []
    away: list[Tensor] = []
    control: list[Tensor] = []
    for layer in range(model.spec.n_layers):
        found, table, off, other = _layer(model, facts, where, layer, steps, seed)
        findings, rows = findings + found, rows + table
        away, control = [*away, off], [*control, other]
    worst, spread = torch.stack(away), torch.stack(control)
    interval = Interval(
        float(worst.min()), float(worst.max()), level=1.0, of="least and greatest of prompts and layers"
    )
    null = range_of(spread, "the edits made for other facts")
    best = max(findings, key=lambda finding: finding.estimate)
    note = f"{best.note}; the edit differs from the patch by at most {interval.high:.1g} of what the MLP writes there"
    claim = "at the subject's token the edit of rank one writes what the patch writes"
    most = 1e-6 if model.backend.dtype == torch.float64 else 1e-5
    verdict = "supported" if interval.high <= most else "refuted"
    n = len(facts) * model.spec.n_layers
    findings.append(Finding("facts.edit_difference", claim, interval.high, interval, null, n, verdict, expected, note))
    return findings, rows


def _layer(
    model: HookedModel, facts: Contrast, where: Where, layer: int, steps: int, seed: int
) -> tuple[list[Finding], list[dict[str, Any]], Tensor, Tensor]:
    """Findings, rows, and how far edits are from patches: their own, and those made for other facts."""
    site, bases = Site(layer, "mlp_post"), list(range(len(facts)))
    task = Interchange(model, facts, site, where, bases)
    partner = _partners(facts)
    v = pair_directions(task, partner, steps=steps).double()
    base = task.states.double().cpu()
    difference = base[partner] - base
    space = weight_read_space(model.backend, site).rows.basis
    seen = torch.nn.functional.normalize(v @ space.T @ space, dim=1)
    drawn = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    amount = (difference * v).sum(1)
    edit, other = _edits(model, facts, site, base, v, amount)
    random = torch.nn.functional.normalize(drawn, dim=1)
    moves = (amount[:, None] * v, _along(difference, seen), difference, None, _along(difference, random))
    patches = [None if move is None else _put(site, base + move, where) for move in moves]
    conditions: list[Condition] = [edit if patch is None else patch for patch in patches]
    shown = [Prompt(**{**vars(p), "answer": facts.prompts[s].answer})
             for p, s in zip(facts.prompts, partner.tolist(), strict=True)]  # fmt: skip
    hits, odds = outcomes(model, shown, [None, *conditions], [_hit(model), _probability(model)])
    score = (odds[1:] - odds[0]) / (1 - odds[0]).clamp(min=1e-12)
    rows: list[dict[str, Any]] = []
    for arm, hit, rewritten in zip(ARMS, hits[1:], score, strict=True):
        rate, spread = mean_of(hit, facts.groups, seed=seed)
        mean, around = mean_of(rewritten, facts.groups, seed=seed)
        ends = {"low": spread.low, "high": spread.high, "rewrite": mean, "rewrite_low": around.low,
                "rewrite_high": around.high}  # fmt: skip
        rows.append({"layer": layer, "exchanged": arm, "flipped": rate, **ends})
    rate, interval = mean_of(hits[1], facts.groups, seed=seed)
    _, null = mean_of(hits[5], facts.groups, seed=seed)
    note = f"at layer {layer} a direction a pair turns {rate:.2f} of facts around, its read part "
    note += f"{float(hits[2].mean()):.2f}, the whole MLP {float(hits[3].mean()):.2f}, the equivalent edit "
    note += f"{float(hits[4].mean()):.2f}"
    null = Interval(null.low, null.high, of="a random direction for each pair")
    claim = f"a direction for each pair turns facts around at layer {layer}"
    flipped = Finding(f"facts.L{layer}.flipped", claim, rate, interval, null, len(facts), note=note)
    gap, around = mean_of(hits[1] - hits[4], facts.groups, seed=seed)
    claim = f"the equivalent edit turns the same facts around at layer {layer}"
    same = Finding(f"facts.L{layer}.edit_gap", claim, gap, around, None, len(facts), judge_absence(around, margin=0.1))
    patched = _written(model, facts, where, layer, conditions[0])
    off, wrong = (_distance(_written(model, facts, where, layer, made), patched) for made in (edit, other))
    return [flipped.judged("above", margin=0.1), same], rows, off, wrong


def _partners(facts: Contrast) -> Tensor:
    """Row of each prompt's partner."""
    rows = {(pair, label): row for row, (pair, label) in enumerate(zip(facts.pairs, facts.labels, strict=True))}
    return torch.tensor([rows[pair, 1 - label] for pair, label in zip(facts.pairs, facts.labels, strict=True)])


def _along(difference: Float[Tensor, "n d"], units: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The component of each row along its own unit vector."""
    return (difference * units).sum(1, keepdim=True) * units


def _put(site: Site, states: Float[Tensor, "n d"], where: Where) -> Patch:
    return Patch(Source({site: states.float()}, torch.arange(len(states)), where, len(states)), where)


def _edits(
    model: HookedModel, facts: Contrast, site: Site, keys: Tensor, v: Tensor, amount: Tensor
) -> tuple[WeightEdit, WeightEdit]:
    """For every prompt the edit that equals its patch, and for comparison the one made for the next prompt."""
    (matrix,) = readers(model.backend, site)
    weight = torch.cat(list(matrix.vectors()))
    states = model.capture(facts, sites=site, where=PROMPT).at(site).double().cpu()
    second = states.T @ states / len(states)
    second += RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    made = [edit_of_patch(weight, key, second, unit, float(a)) for key, unit, a in zip(keys, v, amount, strict=True)]
    write, read = torch.stack([edit.write for edit in made]), torch.stack([edit.read for edit in made])
    return WeightEdit(site.layer, write, read), WeightEdit(site.layer, write.roll(1, 0), read.roll(1, 0))


def _written(model: HookedModel, facts: Contrast, where: Where, layer: int, by: Condition) -> Tensor:
    """What the MLP writes at the subject's token under an intervention."""
    given = [] if by is None else [by]
    acts = model.capture(facts, sites=Site(layer, "mlp_out"), where=where, interventions=given)
    return acts.at(acts.sites[0]).double().cpu()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).norm(dim=1) / b.norm(dim=1)


def _hit(model: HookedModel) -> Any:
    from subspace_probe.metrics import metric_for

    return metric_for("accuracy", model)


def _probability(model: HookedModel) -> Any:
    """Probability of each prompt's answer."""

    def probability(logits: Float[Tensor, "n d_vocab"], prompts: Sequence[Prompt]) -> Float[Tensor, " n"]:
        ids = torch.tensor(model.token_ids([str(prompt.answer) for prompt in prompts]))
        return logits.double().softmax(-1).gather(1, ids[:, None])[:, 0]

    return probability
