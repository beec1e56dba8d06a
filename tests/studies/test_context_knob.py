"""The study against what is known to be true of the organisms."""

from typing import TYPE_CHECKING

import pytest
import torch

from tests.studies.notebooks import Executed, execute

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report


def _run(name: str, **settings: object) -> "Report":
    import subspace_probe as sp
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("context_knob")
    config = study.Config(**{**study.presets["tiny"], **settings})
    return study.run(sp.load_model(f"organism:{name}"), config, progress=False)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    return execute("context_knob", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def report(executed: Executed) -> "Report":
    return executed.report


@pytest.mark.slow
def test_the_notebook(executed: Executed) -> None:
    executed.check()


@pytest.fixture(scope="module")
def early() -> "Report":
    return _run("early")


ABOVE = {
    "written.instruction": 0.97,
    "interchange.knob.another_question": 0.95,
    "interchange.knob.same_question": 0.95,
    "tuned.clamped": 0.95,
    "tuned.lead": 0.30,
    "base.clamped": 0.90,
    "base.gain": 0.15,
}
BELOW = {
    "written.none": 0.05,
    "interchange.last_layer.same_question": 0.10,
    "interchange.last_layer.another_question": 0.10,
}


@pytest.mark.slow
def test_the_knob_is_found_turns_the_tuned_model_and_the_base(report: "Report") -> None:
    for name, bound in ABOVE.items():
        assert report.finding(name).estimate >= bound, report.finding(name)
    for name, bound in BELOW.items():
        assert report.finding(name).estimate <= bound, report.finding(name)
    for name in (*ABOVE, *BELOW):
        assert report.finding(name).verdict == "supported", report.finding(name)
    assert not report.failures()


@pytest.mark.slow
def test_every_number_has_an_interval_and_a_null(report: "Report") -> None:
    for finding in report.findings:
        if finding.verdict == "not tested" or ".control" in finding.name or ".mechanism" in finding.name:
            continue
        assert finding.interval is not None, finding
        assert finding.null is not None, finding
        assert finding.n > 0, finding


@pytest.mark.slow
def test_where_the_intent_is_taken_up_earlier_there_is_no_knob_at_the_last_token(early: "Report") -> None:
    assert early.finding("scan.position").estimate == 2.0
    assert early.finding("scan.before").verdict == "supported"
    for name in ("scan.last", "tuned.clamped", "interchange.knob.another_question"):
        assert early.finding(name).estimate <= 0.05, early.finding(name)
    assert early.finding("tuned.clamped").verdict != "supported"
    assert early.finding("base.clamped").verdict == "not tested"
    assert not early.failures()


@pytest.mark.slow
def test_report_draws_its_figures_and_survives_json(report: "Report") -> None:
    import subspace_probe as sp

    again = sp.Report.from_json(report.to_json())
    assert again.findings == report.findings
    assert {"knob_layers", "knob_variants", "patch_sweep", "strength", "nulls"} <= set(sp.figures.draw(again))
    assert any("Specificity" in line for line in again.tables["summary"].column("sentence"))


@pytest.mark.slow
def test_transfer_by_hand(report: "Report") -> None:
    """The constants of the report, put into the base by a hook on its module, give the figure of the report."""
    import subspace_probe as sp
    from subspace_probe.studies import STUDIES
    from subspace_probe.studies.context_knob import directions, scan_states
    from subspace_probe.studies.context_knob_prompts import confident, prompts_for

    study = STUDIES.load("context_knob")
    config = study.Config(**study.presets["tiny"])
    model, base = sp.load_model("organism:knob"), sp.load_model("organism:knob-base")
    data = prompts_for(model, config, None)
    train = confident(data.train, torch.ones(len(data.train)))
    found = directions(model, train, scan_states(model, train, data.test, config), config, False)
    site = report.provenance.config["direction"]
    (direction,) = [d for d in found.values() if d.site is not None and d.site.short in site]
    values = report.provenance.config["constants"]
    unstated = data.under(data.test, "none")
    unit, hf = direction.unit, base.backend.hf
    target = torch.tensor([values[label] for label in unstated.labels])

    def clamp(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        edited = output.clone()
        edited[:, -1] += (target - output[:, -1] @ unit)[:, None] * unit
        return edited

    assert direction.site is not None
    handle = hf.model.layers[direction.site.layer].register_forward_hook(clamp)
    with torch.no_grad():
        answers = hf(base.tokens(unstated.prompts).ids).logits[:, -1].argmax(-1)
    handle.remove()
    wanted = torch.tensor(base.token_ids([prompt.answer or "" for prompt in unstated.prompts]))
    by_pair: dict[int, bool] = {}
    for pair, hit in zip(unstated.pairs, (answers == wanted).tolist(), strict=True):
        by_pair[pair] = by_pair.get(pair, True) and hit
    by_hand = sum(by_pair.values()) / len(by_pair)
    assert report.finding("base.clamped").estimate == pytest.approx(by_hand, abs=0.02)


@pytest.mark.slow
def test_runs_on_a_users_model_with_a_users_prompts() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("context_knob")
    model = sp.load_model("organism:knob").named("my-model")
    contrast = sp.load_contrast("organism:knob/instruction", split="test")
    few = {**study.presets["tiny"], "n_test": 80, "n_train": 96, "n_validation": 60, "steps": 20, "most_layers": 1}
    words = {"context_text": "context", "prior_text": "memory", "neutral_text": "answer"}
    with pytest.raises(ConfigError, match="'pair'"):
        study.run(model, study.Config(**few))
    with pytest.raises(ConfigError, match="context_text"):
        study.run(model, study.Config(**few), contrast=contrast)
    with pytest.raises(ConfigError, match="base=none"):
        study.run(model, study.Config(**few, **words), contrast=contrast)
    found = study.run(
        model, study.Config(**few, **words, base="none", other_texts=("0|1",)), contrast=contrast, progress=False
    )
    assert found.finding("written.instruction").estimate >= 0.97
    assert found.finding("written.weight").n == 80
    assert all(finding.expected is None for finding in found.findings)  # nothing is known to be true of it
    assert found.finding("specificity.context").verdict == "not tested"


def test_words_are_replaced_and_their_absence_is_said() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import DataError
    from subspace_probe.studies.context_knob_prompts import reworded

    texts = ("use memory or memory end", "use memory or context end")
    contrast = sp.Contrast("c", tuple(sp.Prompt(text=text) for text in texts), (0, 1), (0, 0))
    found = reworded(contrast, ("memory", "context"), ("", "1"))
    assert [prompt.text for prompt in found.prompts] == ["use memory or  end", "use memory or 1 end"]
    with pytest.raises(DataError, match="row 0, of label 0, lacks 'nothing'"):
        reworded(contrast, ("nothing", "context"), ("", ""))
    chat = sp.Contrast("c", (sp.Prompt(messages=({"role": "user", "content": "by memory"},)),), (0,))
    (prompt,) = reworded(chat, ("memory", "context"), ("0", "1")).prompts
    assert prompt.messages[-1]["content"] == "by 0"
