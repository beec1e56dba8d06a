"""Does the separation along the knob say how well a model heeds its intent, and does it say more than any direction's?

Published is a strong correlation over model variants (Minder et al. 2024). Whatever moves the states of the two intents
apart moves them apart along every direction, though, so the same figure for random directions stands beside it, and
the share of the separation that lies along the knob.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Float64
from scipy import stats
from torch import Tensor

from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.intervals import range_of
from subspace_probe.core.tokens import LAST
from subspace_probe.diagnostics.knob_controls import orthogonal_directions
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.linalg.resampling import cluster_index, cluster_weights, percentile_interval
from subspace_probe.metrics.answers import Accuracy
from subspace_probe.metrics.pairs import Pairs
from subspace_probe.models.blending import blended
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.context_knob_clamps import Knob
from subspace_probe.studies.context_knob_prompts import Prompts

RANDOM = 100
"""Random directions beside the knob; they cost no runs."""
_RESAMPLED = 200


@runtime_checkable
class Settings(Protocol):
    """What the variants need of the study's settings."""

    @property
    def shares(self) -> int: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Point:
    """One model under one format of the intent.

    Attributes:
        right: per pair, whether both sides are answered as told, shape [p].
        gaps: per pair, context minus prior along the knob (first) and random directions, shape [1 + random, p].
        groups: of the pairs, shape [p].
    """

    share: float
    form: str
    right: Float64[Tensor, " p"]
    gaps: Float64[Tensor, "direction p"]
    groups: Tensor


def variants(base: HookedModel, tuned: HookedModel, knob: Knob, data: Prompts, config: Settings) -> list[Point]:
    """Models on the line from the base's weights to the tuned one's, under every written format."""
    directions = [knob.direction, *orthogonal_directions(knob.direction, RANDOM, seed=config.seed)]
    along = torch.stack([direction.unit for direction in directions]).double()
    found: list[Point] = []
    for step in range(config.shares):
        share = step / max(1, config.shares - 1)
        model = blended(base, tuned, share)
        for form in (name for name in data.formats if name != "none"):
            asked = data.under(data.test, form)
            pairs = Pairs.of(asked)
            acts = model.capture(asked, sites=knob.direction.site or [], where=LAST)
            states = acts.at(acts.sites[0]).double().cpu()
            moved = states[pairs.rows[:, 1]] - states[pairs.rows[:, 0]]
            right = pairs.accuracy(outcomes(model, asked.prompts, [None], [Accuracy(model)])[0, 0])
            found.append(Point(share, form, right, along @ moved.T, pairs.groups))
    return found


def correlations(points: Sequence[Point], weights: Float[Tensor, "draw p"]) -> Float64[Tensor, "draw direction"]:
    """Spearman's, over the variants, of separation along each direction with pair accuracy.

    Args:
        weights: of the pairs, one row a bootstrap sample.
    """
    whole = weights.double() / weights.sum(1, keepdim=True)
    accuracy = torch.stack([whole @ point.right for point in points])  # [variant, draw]
    gaps = torch.stack([(whole @ point.gaps.T).abs() for point in points])  # [variant, draw, direction]
    ranked = torch.from_numpy(stats.rankdata(accuracy.numpy(), axis=0))
    others = torch.from_numpy(stats.rankdata(gaps.numpy(), axis=0))
    ranked, others = ranked - ranked.mean(0), others - others.mean(0)
    product = (ranked[..., None] * others).sum(0)
    return product / (ranked.square().sum(0)[:, None] * others.square().sum(0)).sqrt()


def correlation_findings(points: Sequence[Point], config: Settings) -> list[Finding]:
    """The correlation, beside random directions; and how much more of the separation lies along the knob."""
    claims = {
        "correlation.knob": "separation along the knob orders the variants by pair accuracy, beyond random directions",
        "correlation.excess": "in every variant the separation along the knob is at least three times that along a "
        "typical random direction",
    }
    if len(points) < 8:
        note = f"{len(points)} variants; at least 8 are needed, between an untuned model and this one"
        return [Finding(name, says, float("nan"), verdict="not tested", note=note) for name, says in claims.items()]
    found = correlations(points, torch.ones(1, len(points[0].right)))[0]
    index = cluster_index("variants", len(points[0].right), points[0].groups.long())
    drawn = torch.cat([
        correlations(points, weights[:, index])[:, 0]
        for weights in cluster_weights(int(index.max()) + 1, _RESAMPLED, seed=config.seed)
    ])  # fmt: skip
    spread = Interval(*percentile_interval(drawn[drawn.isfinite()], 0.95), of="groups of prompts, bootstrap")
    null = range_of(found[1:], f"{RANDOM} random directions orthogonal to the knob")
    n, typical = len(points), float(found[1:].median())
    note = f"Spearman's over {n} variants on one line of weights, not independent; random directions {typical:.2f}"
    first = Finding("correlation.knob", claims["correlation.knob"], float(found[0]), spread, null, n, note=note)
    gaps = torch.stack([point.gaps.mean(1).abs() for point in points])
    ratios = gaps[:, 0] / gaps[:, 1:].median(1).values
    around = Interval(float(ratios.min()), float(ratios.max()), 1.0, of="least and greatest of the variants")
    others = range_of((gaps[:, 1:] / gaps[:, 1:].median(1, keepdim=True).values).amin(0), "random directions")
    verdict = "supported" if around.low >= 3 else "refuted" if around.high < 3 else "inconclusive"
    name = "correlation.excess"
    return [
        first.judged("above", margin=0.1),
        Finding(name, claims[name], float(ratios.min()), around, others, n, verdict),
    ]


def correlation_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row a variant: separation along the knob, and along random directions, with its pair accuracy."""
    rows: list[dict[str, Any]] = []
    for point in points:
        gaps = point.gaps.mean(1).abs()
        low, middle, high = gaps[1:].quantile(torch.tensor([0.025, 0.5, 0.975], dtype=gaps.dtype)).tolist()
        of = {"share": point.share, "format": point.form, "pair_accuracy": float(point.right.mean())}
        rows.append({**of, "knob": float(gaps[0]), "random": middle, "random_low": low, "random_high": high})
    return rows
