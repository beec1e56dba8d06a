"""The study against what is known to be true of the organisms."""

from typing import TYPE_CHECKING

import pytest

from tests.studies.notebooks import Executed, execute

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    return execute("harmfulness", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def chat_report(executed: Executed) -> "Report":
    return executed.report


@pytest.fixture(scope="module")
def natural_report() -> "Report":
    import subspace_probe as sp
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("harmfulness")
    config = study.Config(**{**study.presets["tiny"], "n_test": 240, "strengths": (1.0,)})
    return study.run(sp.load_model("organism:chat-natural"), config, progress=False)


@pytest.mark.slow
def test_the_notebook(executed: Executed) -> None:
    executed.check()


ABOVE = {
    "planted_cosine.harmfulness": 0.85,
    "planted_cosine.refusal": 0.85,
    "judgement_flip.harmfulness": 0.95,
    "refusal_rate.refusal": 0.95,
    "guard_auroc.plain": 0.97,
    "guard_auroc.jailbreak": 0.97,
    "guard_auroc.strict": 0.97,
    "accuracy.ablated": -0.03,
}
BELOW = {
    "judgement_flip.refusal": 0.05,
    "judgement_flip.random": 0.05,
    "refusal_rate.random": 0.05,
    "refusal_rate.ablated": 0.10,
}


@pytest.mark.slow
def test_what_is_planted_in_chat_is_found_and_used(chat_report: "Report") -> None:
    for name, bound in ABOVE.items():
        assert chat_report.finding(name).estimate >= bound, name
    for name, bound in BELOW.items():
        assert chat_report.finding(name).estimate <= bound, name
    for name in (*ABOVE, *BELOW):
        assert chat_report.finding(name).verdict == "supported", chat_report.finding(name)
    assert not chat_report.failures()


@pytest.mark.slow
def test_in_the_natural_organism_harmfulness_is_read_and_not_used(natural_report: "Report") -> None:
    """The certificate says so by interchange of the whole state; the study must come to the same answer by itself."""
    from subspace_probe.organisms import load_truth

    truth = load_truth("chat-natural").readable_not_used
    assert truth is not None
    assert max(truth.changed.values()) < 0.05
    assert natural_report.finding("guard_auroc.plain").estimate >= 0.95
    assert natural_report.finding("judgement_flip.harmfulness").verdict == "refuted"
    assert "does not come from there" in natural_report.tables["summary"].column("sentence")[0]
    assert natural_report.failures()  # an expectation that is not met is shown


@pytest.mark.slow
def test_every_finding_carries_its_evidence(chat_report: "Report", natural_report: "Report") -> None:
    for report in (chat_report, natural_report):
        for finding in report.findings:
            # a check of what a patch does is not tested where it does nothing, and says so
            assert finding.verdict in ("supported", "refuted", "inconclusive") or (
                ".mechanism." in finding.name and finding.note
            ), finding
            if finding.verdict == "not tested":
                continue
            assert finding.n > 0
            if not finding.name.endswith("integrity") and ".mechanism" not in finding.name:
                assert finding.interval is not None
                assert finding.null is not None
        names = {finding.name for finding in report.findings}
        assert {"cosine.cross_position", "cosine.same_position", "refusal.control.random"} <= names


@pytest.mark.slow
def test_the_report_survives_json_and_draws_every_figure(chat_report: "Report") -> None:
    import subspace_probe as sp
    from subspace_probe.figures import FIGURES

    again = sp.Report.from_json(chat_report.to_json())
    assert again.findings == chat_report.findings
    own = {"layers", "separation", "strength", "nulls", "cosines", "guard", "tokens", "selection"}
    assert set(sp.figures.draw(again)) == own <= set(FIGURES)


@pytest.mark.slow
def test_a_model_without_a_template_or_without_words_is_refused(chat) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("harmfulness")
    mute = sp.load_model("organism:chat", words={})
    mute.words.clear()
    with pytest.raises(ConfigError, match="Which words stand for 'refusal'"):
        study.run(mute, study.Config())
    with pytest.raises(ConfigError, match="needs harmful and harmless requests"):
        study.run(chat.named("my-model"), study.Config())


@pytest.mark.slow
def test_a_model_that_always_complies_has_no_refusal_to_find() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("harmfulness")
    settings = {**study.presets["tiny"], "n_train": 48, "n_validation": 48, "n_test": 48}
    with pytest.raises(ConfigError, match="complies with all"):
        study.run(sp.load_model("organism:chat-base"), study.Config(**settings))
