"""Judgements in the shape of OpenAI's moderation results (https://platform.openai.com/docs/api-reference/moderations).

A guard knows one category, its own; OpenAI's clients expect thirteen. All thirteen are there, those the guard does not
judge with the score 0 and no input type applied to them, so that a reader can tell "not judged" from "harmless".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from subspace_probe.core.errors import BackendError
from subspace_probe.guard.examples import Item
from subspace_probe.guard.judgements import Judgement
from subspace_probe.guard.protocols import Judge

CANONICAL: tuple[str, ...] = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""OpenAI's categories; stricter clients refuse an answer without one of them."""


def moderate(guard: Judge, inputs: Sequence[Item], *, strict: bool = False) -> list[dict[str, Any]]:
    """One OpenAI-shaped result an input, in order.

    Args:
        guard: a fitted guard.
        inputs: what it judges.
        strict: leave out all that OpenAI's own answers do not have.
    """
    facts = guard.describe()
    return [result_of(judgement, facts, strict=strict) for judgement in guard.judge(inputs)]


def result_of(judgement: Judgement, facts: Mapping[str, Any], *, strict: bool = False) -> dict[str, Any]:
    """One OpenAI-shaped result.

    Args:
        judgement: of one input.
        facts: what the guard says of itself (`describe()`); read are category, threshold, layers, where, calibrated.
        strict: leave out the guard's own category, where it is none of OpenAI's, and the object `latent_guard`.

    Raises:
        BackendError: a score that is not a finite number, or a probability outside [0, 1]: nothing follows from those.
    """
    score, probability = float(judgement.score), float(judgement.probability)
    if not math.isfinite(score) or not 0.0 <= probability <= 1.0:
        raise BackendError(
            f"The guard gave the score {score} and the probability {probability}, from which nothing follows. Look for "
            "non-finite activations in the model."
        )
    category, flagged = str(facts.get("category", "harmful")), bool(judgement.flagged)
    names = CANONICAL if strict or category in CANONICAL else (*CANONICAL, category)
    result: dict[str, Any] = {
        "flagged": flagged,
        "categories": {name: flagged and name == category for name in names},
        "category_scores": {name: probability if name == category else 0.0 for name in names},
        "category_applied_input_types": {name: ["text"] if name == category else [] for name in names},
    }
    return result if strict else result | {"latent_guard": _evidence(judgement, facts)}


def _evidence(judgement: Judgement, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the decision rests on: the score, what it was compared with, and what that promises."""
    promise = facts.get("threshold") or {}
    return {
        "category": str(facts.get("category", "harmful")),
        "score": float(judgement.score),
        "probability": float(judgement.probability),
        "flagged": bool(judgement.flagged),
        "abstained": bool(judgement.abstained),
        "threshold": float(judgement.threshold),
        "target_fpr": promise.get("target_fpr"),
        "confidence": promise.get("confidence"),
        "bound": promise.get("bound"),
        "grouped": promise.get("grouped"),
        "layers": list(facts.get("layers") or ()),
        "position": facts.get("where"),
        "calibrated": facts.get("calibrated"),
    }
