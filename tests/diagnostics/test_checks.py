"""Every check in the table: what it asks, its power on a planted direction, and its silence on a random one."""

import pytest
import torch


@pytest.fixture(scope="module")
def refusal(chat):
    """Refusal in `chat` at its planted place, with all that an audit needs."""
    import subspace_probe as sp

    train = sp.load_contrast("organism:chat/requests", split="train", n=192)
    test = sp.load_contrast("organism:chat/requests", split="test", n=96).where(label=0, framing=0)
    neutral = sp.load_contrast("organism:chat/skills", split="test", n=30)
    finder = sp.MeanDifference(null_draws=0)
    acts = chat.capture(train, sites=sp.Site(2), where=sp.T_POST_INST).relabel("refused")
    steer = sp.Steer(finder.fit(acts, sp.Site(2)), where=sp.T_POST_INST)
    return steer, test, (finder, acts), neutral


@pytest.fixture(scope="module")
def audited(chat, refusal):
    import subspace_probe as sp

    steer, test, refit, neutral = refusal
    return sp.audit(chat, steer, test, "refusal_score", refit=refit, neutral=neutral)


@pytest.mark.slow
def test_every_check_has_a_question_and_is_answered(audited) -> None:
    from subspace_probe.diagnostics import CHECKS

    for name in CHECKS:
        check = CHECKS.load(name)()
        assert check.question.endswith("?")
        assert any(finding.name.startswith(f"{check.line}.{check.name}") for finding in audited.findings), name
    assert set(audited.tables["questions"].column("verdict")) <= {"supported", "refuted", "inconclusive", "not tested"}


@pytest.mark.slow
def test_a_planted_direction_passes(audited) -> None:
    for name in ("integrity", "random", "permutation", "stability", "dose"):
        assert audited.finding(f"control.{name}").verdict == "supported", audited.finding(f"control.{name}")


@pytest.mark.slow
def test_random_directions_come_out_supported_no_more_often_than_the_null_says(chat, refusal) -> None:
    """Size: the same audit of random directions of the same length; the null's range holds 95 % of them.

    Only the check on random directions can tell: against shuffled labels a random vector of that length is no fair
    opponent, since what is found under them is much shorter. That is why both are run.
    """
    import subspace_probe as sp
    from subspace_probe.diagnostics.random_controls import RandomControls, random_like

    steer, test, _, _ = refusal
    supported = 0
    for seed in range(901, 913):
        fake = steer.with_subspace(random_like(steer.subspace, seed=seed))
        report = sp.audit(chat, fake, test, "refusal_score", checks=[RandomControls(draws=50)])
        supported += report.finding("control.random").verdict == "supported"
    assert supported <= 3  # 0.6 expected of 12; four or more have probability 0.002


def test_strength_zero_does_not_pass_the_integrity_check(chat, refusal) -> None:
    import subspace_probe as sp

    steer, test, _, _ = refusal
    report = sp.audit(chat, steer.with_strength(0.0), test, "refusal_score", checks=["integrity"])
    assert report.finding("control.integrity").verdict == "refuted"


def test_a_dose_curve_that_turns_around_is_not_supported(chat, refusal) -> None:
    """Full dose up, half dose down: the smaller dose has no effect of the same kind."""
    from subspace_probe.diagnostics.cases import Case
    from subspace_probe.diagnostics.dose_response import DoseResponse
    from subspace_probe.metrics import metric_for

    steer, test, _, _ = refusal
    n = len(test)
    clean = torch.zeros(n, dtype=torch.float64)
    case = Case(chat, steer, test, metric_for("refusal_score", chat), "x", 0.1, clean=clean, edited=clean + 3)
    check = DoseResponse()
    spread = torch.linspace(-0.1, 0.1, n, dtype=torch.float64)
    randoms = [0.01 * i for i in range(check.draws)]
    good = torch.stack([spread + v for v in (-3.0, -1.5, 0.7, 1.5, 2.2, 3.0, *randoms)])
    bent = torch.stack([spread + v for v in (3.0, -1.0, 2.0, -4.0, 1.0, 3.0, *randoms)])
    assert check.read(case, good)[0].verdict == "supported"
    assert check.read(case, bent)[0].verdict != "supported"


def test_subspaces_of_other_models_are_refused(chat, refusal) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StaleStore

    steer, test, _, _ = refusal
    base = sp.load_model("organism:chat-base")
    with pytest.raises(StaleStore, match="for_any_model"):
        base.logits(test, interventions=[steer])
    with pytest.raises(StaleStore, match="for_any_model"):
        sp.measure(base, steer, test, "accuracy")
    allowed = steer.with_subspace(steer.subspace.for_any_model())
    assert base.logits(test, interventions=[allowed]).shape == (len(test), base.spec.d_vocab)


def test_without_what_it_needs_a_check_is_not_tested_and_says_why(chat, refusal) -> None:
    import subspace_probe as sp

    steer, test, _, _ = refusal
    report = sp.audit(chat, steer, test, "refusal_score", checks=["stability", "label_permutation", "specificity"])
    for finding in report.findings:
        assert finding.verdict == "not tested"
        assert "refit" in finding.note or "neutral" in finding.note


@pytest.mark.slow
def test_ablation_is_audited_too(chat, refusal) -> None:
    import subspace_probe as sp

    steer, _, _, neutral = refusal
    harmful = sp.load_contrast("organism:chat/requests", split="test", n=48).where(label=1, framing=0)
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
    assert torch.allclose(torch.tensor(report.tables["effects"].column("edited")).double(), edited, atol=1e-3)
    assert {finding.verdict for finding in report.findings} == {"unaudited"}


def test_the_integrity_check_catches_an_identity_write_that_changes_something(chat, refusal) -> None:
    from subspace_probe.diagnostics.cases import Case
    from subspace_probe.diagnostics.integrity import Integrity
    from subspace_probe.metrics import metric_for

    steer, test, _, _ = refusal
    metric = metric_for("refusal_score", chat)
    clean = metric(chat.logits(test), test.prompts)
    case = Case(chat, steer, test, metric, "refusal_score", 0.1, clean=clean, edited=clean)
    assert Integrity().read(case, clean[None])[0].verdict == "supported"
    assert Integrity().read(case, clean[None] + 0.01)[0].verdict == "refuted"
