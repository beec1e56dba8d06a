"""Every check in the table: what it asks, its power on a planted direction, and its silence on a random one."""

from dataclasses import replace

import pytest
import torch


@pytest.fixture(scope="module")
def refusal(chat):
    """Refusal in `chat` at its planted place, with all that an audit needs."""
    import subspace_probe as sp

    train = sp.load_contrast("organism:chat/requests", split="train", n=192)
    test = sp.load_contrast("organism:chat/requests", split="test", n=192).where(label=0, framing=0)
    neutral = sp.load_contrast("organism:chat/skills", split="test", n=60)
    finder = sp.MeanDifference(null_draws=0)
    acts = chat.capture(train, sites=sp.Site(2), where=sp.T_POST_INST).relabel("refused")
    steer = sp.Steer(finder.fit(acts, sp.Site(2)), where=sp.T_POST_INST)
    return steer, test, (finder, acts), neutral


@pytest.fixture(scope="module")
def audited(chat, refusal):
    import subspace_probe as sp

    steer, test, refit, neutral = refusal
    return sp.audit(chat, steer, test, "refusal_score", refit=refit, neutral=neutral)


def test_every_check_has_a_question_and_is_answered(audited) -> None:
    from subspace_probe.diagnostics import CHECKS

    for name in CHECKS:
        check = CHECKS.load(name)()
        assert check.question.endswith("?")
        assert any(finding.name.startswith(f"control.{check.name}") for finding in audited.findings), name
    assert set(audited.tables["questions"].column("verdict")) <= {"supported", "refuted", "inconclusive", "not tested"}


def test_a_planted_direction_passes(audited) -> None:
    for name in ("integrity", "random", "permutation", "stability", "dose"):
        assert audited.finding(f"control.{name}").verdict == "supported", audited.finding(f"control.{name}")


def test_a_random_direction_never_comes_out_supported(chat, refusal) -> None:
    """Size: the same audit of random directions of the same length."""
    import subspace_probe as sp
    from subspace_probe.diagnostics.random_controls import random_like

    steer, test, refit, _ = refusal
    for seed in (901, 902, 903, 904):
        fake = steer.with_subspace(random_like(steer.subspace, seed=seed))
        report = sp.audit(
            chat, fake, test, "refusal_score", refit=refit, checks=["random_controls", "label_permutation"]
        )
        assert report.finding("control.random").verdict != "supported"
        assert report.finding("control.permutation").verdict != "supported"


def test_without_what_it_needs_a_check_is_not_tested_and_says_why(chat, refusal) -> None:
    import subspace_probe as sp

    steer, test, _, _ = refusal
    report = sp.audit(chat, steer, test, "refusal_score", checks=["stability", "label_permutation", "specificity"])
    for finding in report.findings:
        assert finding.verdict == "not tested"
        assert "refit" in finding.note or "neutral" in finding.note


def test_ablation_is_audited_too(chat, refusal) -> None:
    import subspace_probe as sp

    steer, _, _, neutral = refusal
    harmful = sp.load_contrast("organism:chat/requests", split="test", n=96).where(label=1, framing=0)
    report = sp.audit(chat, sp.Ablate(steer.subspace), harmful, "refusal_score", neutral=neutral)
    assert report.finding("control.random").verdict == "supported"
    assert report.finding("control.dose").verdict == "not tested"


def test_measure_is_the_difference_of_two_plain_runs(chat, refusal) -> None:
    import subspace_probe as sp
    from subspace_probe.metrics import metric_for

    steer, test, _, _ = refusal
    report = sp.measure(chat, steer, test, "refusal_score")
    metric = metric_for("refusal_score", chat)
    clean = metric(chat.logits(test), test.prompts)
    edited = metric(chat.logits(test, interventions=[steer]), test.prompts)
    assert report.finding("refusal_score.effect").estimate == pytest.approx(float((edited - clean).mean()), abs=1e-4)
    assert torch.allclose(torch.tensor(report.tables["effects"].column("edited")), edited, atol=1e-3)
    assert {finding.verdict for finding in report.findings} == {"unaudited"}


def test_the_integrity_check_catches_a_hook_that_is_not_pure(chat, refusal) -> None:
    """Control: an intervention whose sites cannot be written back unchanged is refuted."""
    import subspace_probe as sp
    from subspace_probe.diagnostics.cases import Case
    from subspace_probe.diagnostics.integrity import Integrity
    from subspace_probe.metrics import metric_for

    steer, test, _, _ = refusal
    metric = metric_for("refusal_score", chat)
    clean = metric(chat.logits(test), test.prompts)
    case = Case(chat, steer, test, metric, "refusal_score", 0.1, clean=clean, edited=clean)
    bad = replace(case, clean=clean + 1e-6)
    assert Integrity().read(case, clean[None])[0].verdict == "supported"
    assert Integrity().read(bad, clean[None])[0].verdict == "refuted"
    assert isinstance(sp.Report("x", tuple(Integrity().read(case, clean[None]))).to_json(), str)
