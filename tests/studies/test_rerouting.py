"""The study against the exhaustive truth of the guard organisms, and on prompts of one's own."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.studies.notebooks import Executed, execute

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report
    from subspace_probe.studies.study import Study


def study() -> "Study":
    from subspace_probe.studies import STUDIES

    return STUDIES.load("rerouting")


def ran(name: str, **changed: Any) -> "Report":
    import subspace_probe as sp

    asked = study()
    model = sp.load_model(f"organism:{name}")
    return asked.run(model, asked.Config(**{**asked.presets["tiny"], **changed}), progress=False)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    return execute("rerouting", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def report(executed: Executed) -> "Report":
    return executed.report


@pytest.fixture(scope="module")
def robust() -> "Report":
    return ran("robust")


@pytest.mark.slow
def test_the_notebook(executed: Executed) -> None:
    executed.check()


@pytest.mark.slow
def test_the_planted_pair_is_found_and_the_verdict_is_reachable(report: "Report") -> None:
    from subspace_probe.organisms import load_truth

    truth = load_truth("override").suffixes
    assert truth is not None
    assert (truth.flipped, truth.others) == (1.0, 0)
    assert not report.failures()
    for level in ("activation", "token"):
        found = report.finding(f"L1.resid_post.{level}.flipped")
        assert found.estimate >= 0.95
        assert found.verdict == "supported"
    assert report.finding("token.planted").estimate >= 0.95
    assert report.finding("token.right").estimate >= 0.95
    (row,) = report.tables["verdicts"].records()
    assert row["verdict"] == "reachable"
    # what was found, as ids: the planted pair and nothing else
    ids = {row["ids"] for row in report.tables["prompts"].where(level="token").records()}
    assert ids == {" ".join(map(str, truth.planted))}


@pytest.mark.slow
def test_a_layer_that_is_not_read_is_no_target(report: "Report") -> None:
    layers = report.tables["probes"].records()
    assert [row["eligible"] for row in layers] == [False, True, True, True]
    assert layers[0]["cv_accuracy"] < 0.8
    assert report.finding("read.L0").verdict == "refuted"
    assert report.finding("read.L1").verdict == "supported"
    assert {row["site"] for row in report.tables["eligibility"].records()} == {"L1.resid_post"}
    assert report.tables["eligibility"].column("p")[0] <= 0.05


@pytest.mark.slow
def test_the_target_beats_chance_and_costs_less_than_the_answer(report: "Report") -> None:
    assert report.finding("search.ahead_of_random.160_rows").estimate >= 0.5
    assert report.finding("search.cost_of_answer").estimate > 1.5
    assert report.finding("search.cost_of_answer").verdict == "supported"
    curve = report.tables["curve"]
    for search in ("target", "answer", "random"):
        shares = curve.where(search=search, unit="rows").column("flipped")
        assert shares == sorted(shares)
    # the answer is not far behind by rows here: reported, and expected of nothing
    ahead = report.finding("search.ahead_of_answer.160_rows")
    assert ahead.expected is None
    assert ahead.verdict in ("inconclusive", "refuted", "supported")


@pytest.mark.slow
def test_repair_takes_the_override_away_and_leaves_the_rest(report: "Report") -> None:
    assert report.finding("repair.found_tokens").estimate == 0.0
    assert report.finding("repair.found_tokens").verdict == "supported"
    assert report.finding("repair.clean_accuracy").estimate >= 0.99
    assert report.finding("repair.random_tokens_accuracy").estimate >= 0.97
    assert report.finding("repair.search").estimate == 0.0
    every = report.finding("repair.every_choice")
    assert every.estimate == 0.0
    assert "1600 choices" in every.note
    before = {row["measure"]: row["before"] for row in report.tables["repair"].records()}
    assert before["found_tokens"] == before["search"] == before["every_choice"] == 1.0


@pytest.mark.slow
def test_control_the_robust_twin_is_steerable_and_not_reachable(robust: "Report") -> None:
    assert not robust.failures()
    (row,) = robust.tables["verdicts"].records()
    assert row["verdict"] == "steerable, not reachable"
    assert robust.finding("L1.resid_post.activation.flipped").estimate >= 0.95
    token = robust.finding("L1.resid_post.token.flipped")
    assert (token.estimate, token.verdict) == (0.0, "refuted")
    assert robust.finding("search.ahead_of_random.160_rows").verdict == "refuted"
    repair = robust.finding("repair.found_tokens")
    assert repair.verdict == "not tested"
    assert "nothing to train on" in repair.note
    assert "nothing to repair" in robust.tables["summary"].column("sentence")[-1]


@pytest.mark.slow
def test_control_too_little_training_is_reported_as_unmet() -> None:
    """One step of repair changes nothing, and the report says so."""
    poor = ran("override", repair_steps=1, repair_rate=1e-6, n_exhaustive=0, n_test=12, n_train=96)
    assert {finding.name for finding in poor.failures()} == {"repair.found_tokens", "repair.search"}
    assert poor.finding("repair.found_tokens").estimate == 1.0
    assert poor.finding("repair.found_tokens").verdict != "supported"
    assert poor.finding("repair.clean_accuracy").met


@pytest.mark.slow
def test_the_report_survives_json_and_draws(report: "Report") -> None:
    import subspace_probe as sp

    again = sp.Report.from_json(report.to_json())
    assert again.findings == report.findings
    assert set(sp.figures.draw(again)) == {"ladder", "searches"}
    for finding in report.findings:
        assert finding.verdict in ("supported", "refuted", "inconclusive", "not tested"), finding


@pytest.mark.slow
def test_prompts_of_ones_own_with_stated_positions_and_tokens() -> None:
    """The same organism as a user's model: nothing known to be true, no repair unless asked for."""
    import subspace_probe as sp
    from subspace_probe.models import load_model

    loaded = sp.load_model("organism:override")
    model = load_model(loaded.backend.hf, tokenizer=loaded.tokenizer)
    assert model.directory is None
    prompts = replace(sp.load_contrast("organism:override/requests", split="test", n=180), name="mine")
    asked = study()
    given: dict[str, Any] = {"n_train": 72, "n_test": 8, "budget": 40, "permutations": 19, "draws": 2}
    config = asked.Config(**given, free="7,8", allowed="16-55")
    report = asked.run(model, config, contrast=prompts, progress=False)
    assert all(finding.expected is None for finding in report.findings)
    assert not [finding for finding in report.findings if finding.name.startswith("repair")]
    assert "token.planted" not in {finding.name for finding in report.findings}
    ids = [row["ids"] for row in report.tables["prompts"].where(level="token").records()]
    assert all(16 <= int(i) <= 55 for row in ids for i in row.split())


def test_what_is_missing_is_said() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError, DataError

    asked = study()
    chat = sp.load_model("organism:chat")
    with pytest.raises(ConfigError, match="needs prompts for organism:chat: a file with 'prompt', 'label'"):
        asked.run(chat, asked.Config())
    mine = sp.load_contrast("organism:override/requests", split="test", n=60)
    with pytest.raises(ConfigError, match="No free positions were given"):
        asked.run(chat, asked.Config(), contrast=mine)
    few = sp.load_contrast("organism:override/requests", split="test", n=20)
    with pytest.raises(DataError):
        asked.run(chat, asked.Config(free="7,8"), contrast=few)


@pytest.mark.slow
def test_where_nothing_is_read_nothing_is_tried() -> None:
    """Labels that mean nothing: no layer may be a target, and the report says that and no more."""
    import subspace_probe as sp

    asked = study()
    model = sp.load_model("organism:override")
    sides = sp.load_contrast("organism:override/requests", split="test", n=120).where(label=0)
    mixed = replace(sides, labels=tuple(i % 2 for i in range(len(sides))), pairs=(), name="nothing")
    report = asked.run(model, asked.Config(free="7,8", n_train=40), contrast=mixed, progress=False)
    assert set(report.tables) == {"probes", "summary"}
    assert not any(report.tables["probes"].column("eligible"))
    assert "was not tried" in report.tables["summary"].column("sentence")[-1]
