"""Judgements as OpenAI's moderation results."""

import json
from typing import Any

import pytest

FACTS: dict[str, Any] = {
    "category": "harmful",
    "layers": [5],
    "where": "t_inst",
    "calibrated": None,
    "threshold": {"value": 0.5, "target_fpr": 0.01, "confidence": 0.95, "bound": 0.009, "grouped": True},
}


def result(*, strict: bool = False, flagged: bool = True, **facts: Any) -> dict[str, Any]:
    from subspace_probe.guard.judgements import Judgement
    from subspace_probe.guard.moderation import result_of

    judgement = Judgement(score=1.5, probability=0.875, flagged=flagged, abstained=not flagged, threshold=0.5)
    return result_of(judgement, FACTS | facts, strict=strict)


def test_all_of_openais_categories_and_our_own() -> None:
    from openai.types.moderation import Categories, CategoryScores

    from subspace_probe.guard.moderation import CANONICAL

    theirs = {field.alias or name for name, field in Categories.model_fields.items()}
    assert set(CANONICAL) == theirs  # the client's own list is the reference
    assert {field.alias or name for name, field in CategoryScores.model_fields.items()} == theirs
    found = result()
    for part in ("categories", "category_scores", "category_applied_input_types"):
        assert set(found[part]) == theirs | {"harmful"}
    assert [name for name, value in found["categories"].items() if value] == ["harmful"]
    assert {name: score for name, score in found["category_scores"].items() if score} == {"harmful": 0.875}
    assert [name for name, types in found["category_applied_input_types"].items() if types] == ["harmful"]


def test_the_evidence() -> None:
    assert result()["latent_guard"] == {
        "category": "harmful",
        "score": 1.5,
        "probability": 0.875,
        "flagged": True,
        "abstained": False,
        "threshold": 0.5,
        "target_fpr": 0.01,
        "confidence": 0.95,
        "bound": 0.009,
        "grouped": True,
        "layers": [5],
        "position": "t_inst",
        "calibrated": None,
    }


def test_without_a_threshold_nothing_is_promised() -> None:
    evidence = result(threshold=None)["latent_guard"]
    assert [evidence[name] for name in ("threshold", "target_fpr", "bound", "grouped")] == [0.5, None, None, None]


def test_strict_has_nothing_that_openai_has_not() -> None:
    from openai.types.moderation import Moderation

    found = result(strict=True)
    assert set(found) == set(Moderation.model_fields)
    assert len(found["categories"]) == 13
    assert found["flagged"] is True  # though no category of theirs is


def test_a_category_of_openais_needs_no_extra() -> None:
    found = result(category="violence", strict=True)
    assert found["categories"]["violence"] is True
    assert found["category_scores"]["violence"] == 0.875
    assert list(result(category="violence")["categories"]) == list(found["categories"])


def test_not_flagged() -> None:
    found = result(flagged=False)
    assert not any(found["categories"].values())
    assert found["category_scores"]["harmful"] == 0.875
    assert found["latent_guard"]["abstained"] is True


@pytest.mark.parametrize(("score", "probability"), [(float("nan"), 0.5), (float("inf"), 0.5), (1.0, 1.5), (1.0, -0.1)])
def test_a_number_from_which_nothing_follows(score: float, probability: float) -> None:
    from subspace_probe.core.errors import BackendError
    from subspace_probe.guard.judgements import Judgement
    from subspace_probe.guard.moderation import result_of

    with pytest.raises(BackendError, match="nothing follows"):
        result_of(Judgement(score, probability, False, False, 0.0), FACTS)


def test_moderate_keeps_the_order() -> None:
    from subspace_probe.guard.moderation import moderate
    from tests.serve.stub import StubGuard, score_of

    texts = [f"text {n}" for n in range(20)]
    results = moderate(StubGuard(), texts)
    assert [found["latent_guard"]["score"] for found in results] == [score_of(text) for text in texts]
    json.dumps(results, allow_nan=False)
