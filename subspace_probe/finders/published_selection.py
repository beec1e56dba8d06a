"""The published choice of a refusal direction among positions and layers.

Arditi et al. 2024 (arXiv:2406.11717), section 2.3 and appendix C: candidates are mean differences at the block inputs
of every post-instruction token. Kept are those with layer < 0.8 L, KL on harmless prompts at most 0.1 and an induce
score of at least 0; taken is the one with the lowest bypass score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Metric
from subspace_probe.core.subspaces import Subspace
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


def evaluate_candidates(
    model: HookedModel,
    directions: Mapping[tuple[int, int], Subspace],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    metric: Metric,
) -> list[Candidate]:
    """The three scores of every candidate.

    Args:
        directions: (position, layer) to the raw mean difference at that block's input.
        harmful, harmless: validation prompts.
        metric: the refusal score.
    """
    rows: list[Candidate] = []
    clean = condition_logits(model, harmless, [None])[0]
    for (position, layer), direction in directions.items():
        ablate, steer = Ablate(direction), Steer(direction)
        bypass = metric(condition_logits(model, harmful, [ablate])[0], harmful)
        ablated, steered = condition_logits(model, harmless, [ablate, steer])
        divergence = published_kl(clean, ablated)
        induced = metric(steered, harmless)
        rows.append(Candidate(position, layer, float(bypass.mean()), float(induced.mean()), float(divergence.mean())))
    return rows
