"""The study of unlearning on the organism, against its bars, and what it says where it cannot run."""

from typing import TYPE_CHECKING

import pytest

from tests.studies.notebooks import Executed, execute

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report
    from subspace_probe.models.hooked import HookedModel


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    return execute("unlearning", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def report(executed: Executed) -> "Report":
    return executed.report


@pytest.mark.slow
def test_the_notebook(executed: Executed) -> None:
    executed.check()


@pytest.mark.slow
def test_the_topic_is_no_longer_said_the_rest_is_and_the_update_stays_in_its_span(report: "Report") -> None:
    assert report.finding("forget_accuracy.before").estimate == 1.0
    assert report.finding("forget_accuracy.sspu").estimate <= 1 / 24 + 0.05
    assert report.finding("retain_change.sspu").estimate >= -0.03
    assert report.finding("off_span.sspu").estimate <= 1e-5
    # the control: the soft penalty leaves the span, and free weights leave it altogether
    assert report.finding("off_span.soft").estimate > 0.01
    assert report.finding("off_span.rmu").estimate > 0.5
    assert not report.failures()


@pytest.mark.slow
def test_what_is_suppressed_and_not_gone_is_said(report: "Report") -> None:
    again = report.finding("relearned.sspu")
    assert again.null is not None
    assert again.estimate > again.null.high + 0.1
    # one run with exchanged answers is too few for a verdict; what came back is told all the same
    assert again.null.level < 0.95
    assert again.verdict == "unaudited"
    assert again.note.startswith(f"{again.estimate:.2f} comes back")
    assert report.finding("probe.sspu").null is not None
    assert "What is not said is not thereby gone" in report.tables["summary"].column("sentence")[-1]


@pytest.mark.slow
def test_the_comparison_is_over_five_seeds_and_reported_whatever_it_says(report: "Report") -> None:
    rows = report.tables["comparison"].records()
    assert [row["arm"] for row in rows] == ["sspu"] * 5 + ["rmu"] * 5
    for name in ("forget", "ranked", "retain"):
        found = report.finding(f"comparison.{name}")
        paired = [a[name] - b[name] for a, b in zip(rows[:5], rows[5:], strict=True)]
        assert found.estimate == pytest.approx(sum(paired) / 5)
        assert found.expected is None


@pytest.mark.slow
def test_the_layer_is_the_one_whose_trial_was_best(report: "Report") -> None:
    rows = report.tables["sites"].records()
    assert [row["layer"] for row in rows] == [1, 2, 3]
    best = min(rows, key=lambda row: row["forget"] - row["retain"])
    assert [row for row in rows if row["chosen"]] == [best]


def test_held_out_prompts_are_other_prompts_and_what_is_kept_asks_for_no_capital(chat: "HookedModel") -> None:
    from subspace_probe.organisms import words
    from subspace_probe.studies.unlearning import Config
    from subspace_probe.studies.unlearning_prompts import prompts_for

    data = prompts_for(chat, Config(), None)
    seen, *others = (
        {repr(p.messages) for p in part.prompts} for part in (data.forget, data.forget_val, data.forget_test)
    )
    assert not any(seen & other for other in others)
    assert not others[0] & others[1]
    for part in (data.retain, data.retain_val, data.retain_test):
        asked = [p for p in part.prompts if any("capital of" in m["content"] for m in p.messages)]
        assert not [p for p in asked if p.answer in words.CAPITALS]
    assert data.elsewhere is not None
    assert {p.answer for p in data.elsewhere.prompts} <= set(words.CAPITALS)


def test_of_a_topic_that_was_never_known_nothing_is_said_to_be_forgotten() -> None:
    from subspace_probe.core.findings import Expectation, Finding
    from subspace_probe.studies.unlearning_tables import where_known

    names = ("forget_accuracy.before", "forget_accuracy.sspu", "relearned.rmu", "probe.sspu", "retain_change.sspu")
    bound = Expectation(below=0.1)
    for verdict in ("supported", "inconclusive"):
        before, *after = (Finding(name, "", 0.05, verdict=verdict, expected=bound) for name in names)
        told = where_known(before, [before, *after])
        if verdict == "supported":
            assert told == [before, *after]
            continue
        assert [one.verdict for one in told] == [verdict, *["not tested"] * 3, verdict]
        assert all("nothing to forget" in one.note and one.expected is None for one in told[1:4])


def test_equal_differences_get_an_interval_to_both_sides() -> None:
    import torch

    from subspace_probe.studies.unlearning_tables import comparison_findings

    for shift in (0.0, 0.25):
        low, high = ({name: torch.full((4,), x) for name in ("forget", "ranked", "retain")} for x in (0.5, 0.5 + shift))
        for one in comparison_findings({"sspu": [high] * 5, "rmu": [low] * 5}, ["sspu", "rmu"]):
            assert one.interval is not None
            assert one.estimate == shift
            assert one.interval.high - shift == pytest.approx(shift - one.interval.low)
            assert one.interval.high - shift == pytest.approx(0.4345, abs=1e-4)  # Wilson, 0 of 5
            assert one.verdict == "inconclusive"


@pytest.mark.slow
def test_seeds_of_the_study_share_no_control_vector(report: "Report") -> None:
    from subspace_probe.studies.unlearning import Config, control_seed

    assert len({control_seed(Config(seed=seed), k) for seed in range(4) for k in range(1000)}) == 4000
    assert [row["seed"] for row in report.tables["comparison"].records()] == [0, 1, 2, 3, 4] * 2


def test_settings_are_checked_before_any_work(chat: "HookedModel", monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.studies import unlearning

    monkeypatch.setattr(unlearning, "prompts_for", lambda *_: pytest.fail("work was begun"))
    wrong = {
        "relearn_steps": 0, "relearn_draws": -1, "relearn_share": 1.0, "relearn_lr": float("nan"), "seeds": 0,
        "draws": 0, "latents": 0, "steps": 0, "lr": 0.0, "n_test": 0,
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=name):
            unlearning.run(chat, unlearning.Config(**{name: value}), progress=False)
    with pytest.raises(ConfigError, match="at most 1000"):
        unlearning.run(chat, unlearning.Config(seeds=1001), progress=False)


def test_a_model_of_ones_own_is_told_what_is_missing(chat: "HookedModel") -> None:
    from dataclasses import replace

    from subspace_probe.core.errors import ConfigError, DataError
    from subspace_probe.studies.unlearning import Config, run
    from subspace_probe.studies.unlearning_prompts import joined, prompts_for

    mine = chat.named("mine")
    with pytest.raises(ConfigError, match="topic to forget for mine"):
        run(mine, Config(), progress=False)
    data = prompts_for(chat, Config(), None)
    given = joined("mine", data.forget, data.retain)
    with pytest.raises(ConfigError, match="sparse autoencoder of a residual stream of mine"):
        run(mine, Config(), contrast=given, progress=False)
    with pytest.raises(DataError, match="have no answer"):
        run(mine, Config(), contrast=given.map(lambda p: replace(p, answer=None)), progress=False)
    with pytest.raises(ConfigError, match="Known: sspu"):
        run(chat, Config(arms="sspu,other"), progress=False)
