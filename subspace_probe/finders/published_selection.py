"""The published choice of a refusal direction among positions and layers.

Arditi et al. 2024 (arXiv:2406.11717), section 2.3 and appendix C: candidates are mean differences at the block inputs
of every post-instruction token. Kept are those with layer < 0.8 L, KL on harmless prompts at most 0.1 and an induce
score of at least 0; taken is the one with the lowest bypass score.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from tqdm.auto import tqdm

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Metric
from subspace_probe.core.reports import Table
from subspace_probe.core.sites import resid_pre
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST, T_INST
from subspace_probe.finders.mean_difference import MeanDifference
from subspace_probe.interventions.ablate import Ablate
from subspace_probe.interventions.conditions import condition_logits
from subspace_probe.interventions.steer import Steer
from subspace_probe.metrics.behaviour import published_kl
from subspace_probe.models.hooked import HookedModel


@final
@dataclass(frozen=True)
class Candidate:
    """One position and layer with its three scores.

    Attributes:
        position: negative offset from the end of the prompt.
        layer: block whose input it was read at, from 0.
        bypass: mean refusal score of harmful prompts with the direction ablated everywhere.
        induce: mean refusal score of harmless prompts with the direction added at its layer, all positions.
        kl: mean KL on harmless prompts under ablation, in nats.
    """

    position: int
    layer: int
    bypass: float
    induce: float
    kl: float


def select_published(
    candidates: Sequence[Candidate], n_layers: int, *, kl_most: float = 0.1, induce_least: float = 0.0, cut: float = 0.2
) -> tuple[Candidate, ...]:
    """The survivors, best first; the first is the published pick.

    Raises:
        ConfigError: nothing survives.
    """
    kept = [
        c
        for c in candidates
        # NaN first: every comparison with it is False
        if not any(map(math.isnan, (c.bypass, c.induce, c.kl)))
        and c.layer < int(n_layers * (1 - cut))
        and c.kl <= kl_most
        and c.induce >= induce_least
    ]
    if not kept:
        deepest = int(n_layers * (1 - cut))
        raise ConfigError(
            f"None of {len(candidates)} candidates survives the published filters: layer < {deepest}, "
            f"KL <= {kl_most}, induce >= {induce_least}. The model may not refuse through one direction."
        )
    return tuple(sorted(kept, key=lambda c: c.bypass))


def find_published(
    model: HookedModel,
    train: Contrast,
    validation: Contrast,
    metric: Metric,
    *,
    prompts: int = 32,
    progress: bool = False,
) -> tuple[Subspace | None, Table]:
    """The published procedure whole: mean differences at every post-instruction token and block input, then the choice.

    Args:
        train: harmful (label 1) and harmless requests the means are taken over.
        validation: requests the candidates are scored on, at most `prompts` a class.
        metric: the refusal score.

    Returns:
        The pick, None where no candidate survives, and every candidate with its scores.

    Raises:
        PositionError: no chat template.
    """
    harmful, harmless = (validation.where(label=label).prompts[:prompts] for label in (1, 0))
    directions = template_directions(model, train)
    rows = evaluate_candidates(model, directions, harmful, harmless, metric, progress=progress)
    try:
        kept = select_published(rows, model.spec.n_layers)
    except ConfigError:
        kept = ()
    records = [{**vars(row), "kept": row in kept, "chosen": bool(kept) and row == kept[0]} for row in rows]
    table = Table.of(records, "the published filters on layer, KL and induce score, then the lowest bypass score")
    if not kept:
        return None, table
    pick = directions[kept[0].position, kept[0].layer]
    return replace(pick, notes={**pick.notes, "selection": "published", **vars(kept[0])}), table


def template_directions(model: HookedModel, train: Contrast) -> dict[tuple[int, int], Subspace]:
    """Raw mean differences at the template's tokens behind the instruction, by position from the end and layer."""
    batch = model.tokens(train.prompts)
    tail = int((batch.lengths - 1 - batch.position(T_INST)).min())
    found: dict[tuple[int, int], Subspace] = {}
    for position in range(-tail, 0):
        acts = model.capture(train, sites=resid_pre(), where=LAST.offset(position + 1))
        for site in acts.sites:
            fit = MeanDifference(null_draws=0).fit(acts, site)
            if float(fit.scale[0]) > 0:  # layer 0 of template tokens: every prompt has the same state
                found[position, site.layer] = fit
    return found


def evaluate_candidates(
    model: HookedModel,
    directions: Mapping[tuple[int, int], Subspace],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    metric: Metric,
    *,
    progress: bool = False,
) -> list[Candidate]:
    """The three scores of every candidate.

    Args:
        directions: (position, layer) to the raw mean difference at that block's input.
        harmful, harmless: validation prompts.
        metric: the refusal score.
    """
    rows: list[Candidate] = []
    clean = condition_logits(model, harmless, [None])[0]
    shown: Callable[..., Any] = tqdm
    bar = shown(directions.items(), desc="candidates", disable=not progress, leave=False)
    for (position, layer), direction in bar:
        ablate, steer = Ablate(direction), Steer(direction)
        bypass = metric(condition_logits(model, harmful, [ablate])[0], harmful)
        ablated, steered = condition_logits(model, harmless, [ablate, steer])
        divergence = published_kl(clean, ablated)
        induced = metric(steered, harmless)
        rows.append(Candidate(position, layer, float(bypass.mean()), float(induced.mean()), float(divergence.mean())))
    return rows
