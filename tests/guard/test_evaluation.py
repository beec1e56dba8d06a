"""The whole report on an organism: fitted on plain requests, where the refusal direction fails and the guard holds."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.reports import Report
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.models.hooked import HookedModel

pytestmark = pytest.mark.slow
CERTAIN = {"control.length", "baseline.majority.accuracy"}
"""Pairs of one length and one prompt of each class: these figures are what they are in every draw, by design."""


@pytest.fixture(scope="module")
def parts() -> "tuple[Contrast, Contrast, Contrast]":
    """Plain requests to fit on, requests in all framings to measure on, harmless ones for the threshold."""
    import subspace_probe as sp

    train, test, val = (sp.load_contrast("organism:chat/requests", split=s, n=n) for s, n in zip(
        ("train", "test", "val"), (600, 480, 240), strict=True))  # fmt: skip
    return train.where(framing=0), test, val.where(label=0)


@pytest.fixture(scope="module")
def guard(chat: "HookedModel", parts: "tuple[Contrast, Contrast, Contrast]") -> "LatentGuard":
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.probe import LatentProbe

    made = LatentGuard(chat, LatentProbe("lda"), layers=[3]).fit(parts[0])
    return made.set_threshold(parts[2], target_fpr=0.1, confidence=0.9)


@pytest.fixture(scope="module")
def report(guard: "LatentGuard", parts: "tuple[Contrast, Contrast, Contrast]") -> "Report":
    train, test, _ = parts
    hard = test.where(label=0, framing=2)
    return guard.report(
        test, train=train, slices=("framing",), refused="refused", hard_benign=hard, draws=200, base_rates=(0.01,)
    )


def test_figures_are_those_of_scikit_learn(guard: Any, parts: Any, report: "Report") -> None:
    test = parts[1]
    y, scores, p = np.array(test.labels), guard.decision_function(test), guard.predict_proba(test)[:, 1]
    assert report.finding("auroc").estimate == pytest.approx(roc_auc_score(y, scores))
    assert report.finding("auprc").estimate == pytest.approx(average_precision_score(y, scores))
    assert report.finding("brier").estimate == pytest.approx(brier_score_loss(y, p))
    assert report.finding("recall.at_threshold").estimate == pytest.approx(guard.predict(test)[y == 1].mean())
    jail = np.array(test.factors["framing"]) == 1
    assert report.finding("auroc.framing.1").estimate == pytest.approx(roc_auc_score(y[jail], scores[jail]))


def test_the_guard_holds_where_the_refusal_direction_fails(report: "Report") -> None:
    for framing in (0, 1, 2):
        assert report.finding(f"auroc.framing.{framing}").estimate > 0.97
    refusal = report.finding("baseline.refusal_direction.tpr.at_fpr_1pct.framing.1")
    assert refusal.estimate < 0.3
    assert report.finding("baseline.refusal_direction.auroc.framing.1").estimate < 0.92
    assert report.finding("baseline.refusal_direction.auroc.framing.0").estimate > 0.97  # it works where it should
    assert report.finding("baseline.refusal_direction.difference").verdict == "supported"
    assert report.finding("baseline.tfidf.difference").verdict == "supported"
    assert report.finding("auroc").verdict == "supported"


def test_no_interval_is_a_point_and_each_holds_its_estimate(report: "Report") -> None:
    from subspace_probe.core.reports import Report

    for finding in report.findings:
        spread = finding.interval
        if spread is None or math.isnan(spread.low) or finding.name in CERTAIN:
            continue
        assert spread.low < spread.high, finding.name
        assert spread.low - 1e-9 <= finding.estimate <= spread.high + 1e-9, finding.name
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def test_tables_draw_and_say_what_was_found(report: "Report") -> None:
    from subspace_probe.figures import draw

    assert set(draw(report)) == {"guard", "baselines", "operating", "reliability"}
    wanted = {
        "guard",
        "reliability",
        "operating",
        "baselines",
        "controls",
        "base_rates",
        "latency",
        "threshold",
        "summary",
    }
    assert set(report.tables) == wanted
    assert sum(report.tables["reliability"].column("n")) == report.finding("auroc").n
    said = " ".join(report.tables["summary"].column("sentence"))
    assert "agrees with" in said
    assert "the refusal direction has" in said
    held = report.tables["threshold"].records()[0]
    assert held["fpr"] == report.finding("fpr.at_threshold").estimate
    timed = report.finding("latency.own_pass.ratio")
    assert timed.estimate > 0
    assert "1.000 of the blocks" in timed.note


def test_labels_that_mean_nothing_support_nothing(chat: "HookedModel", parts: "tuple[Contrast, ...]") -> None:
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.probe import LatentProbe

    train, test, _ = parts
    drawn = tuple(np.random.default_rng(5).permutation(train.labels).tolist())
    shuffled = replace(train, labels=drawn, pairs=tuple(range(len(train))), groups=tuple(range(len(train))))
    blind = LatentGuard(chat, LatentProbe("mean_difference"), layers=[1]).fit(shuffled)
    found = blind.report(test.sample(240, seed=0), train=shuffled.sample(120, seed=0), latency=False, draws=100)
    assert found.finding("auroc").verdict in {"inconclusive", "refuted"}
    assert found.finding("fpr.at_threshold").verdict == "unaudited"  # no threshold was set


def test_what_the_guard_was_made_from_is_refused(guard: Any, parts: "tuple[Contrast, ...]") -> None:
    from subspace_probe.core.errors import ConfigError, DataError

    train, test, negatives = parts
    with pytest.raises(DataError, match="fitted on"):
        guard.report(train)
    with pytest.raises(DataError, match="used to set the threshold"):
        guard.report(test, hard_benign=negatives)
    with pytest.raises(DataError, match="are also in train"):
        guard.report(test, train=test)
    with pytest.raises(ConfigError, match="Give train="):
        guard.report(test, refused="refused")
    with pytest.raises(ConfigError, match="factors"):
        guard.report(list(test.prompts), np.array(test.labels), slices=("framing",))


def test_without_training_prompts_claims_stay_unaudited(guard: Any, parts: "tuple[Contrast, ...]") -> None:
    found = guard.report(list(parts[1].prompts), np.array(parts[1].labels), latency=False, draws=50)
    assert found.finding("auroc").verdict == "unaudited"
    assert "baselines" not in found.tables
    assert not [finding for finding in found.findings if finding.name.startswith(("baseline.", "latency."))]
