"""The study against what is known of the organism: its answer state, and which attributes it uses."""

from typing import TYPE_CHECKING

import pytest
import torch

from tests.studies.notebooks import Executed, execute

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report
    from subspace_probe.models.hooked import HookedModel


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    return execute("sae_evaluation", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def report(executed: Executed) -> "Report":
    return executed.report


@pytest.mark.slow
def test_the_notebook(executed: Executed) -> None:
    executed.check()


@pytest.mark.slow
def test_supervised_dictionaries_serve_the_model_and_edit_it(report: "Report") -> None:
    assert not report.failures()
    assert report.finding("sufficiency.supervised").estimate >= 0.95
    assert report.finding("edit.io.supervised").estimate >= 0.95
    for name in ("sufficiency.supervised", "necessity.supervised", "edit.io.supervised", "closed.io.supervised"):
        assert report.finding(name).verdict == "supported", report.finding(name)
    assert report.finding("edit.io.control").verdict == "supported"
    assert report.provenance.config["cross_section"] == "L3.resid_mid"


@pytest.mark.slow
def test_learned_dictionaries_lie_between_random_ones_and_the_skyline(report: "Report") -> None:
    """Task above broad above a frozen decoder; a frozen decoder is no better than random ones."""
    edits = {arm: report.finding(f"edit.io.{arm}") for arm in ("supervised", "task", "broad", "frozen", "random")}
    assert edits["supervised"].estimate > edits["task"].estimate > edits["broad"].estimate > 0.1
    assert edits["task"].verdict == edits["broad"].verdict == "supported"
    for arm in ("frozen", "random"):  # the controls that must fail
        assert edits[arm].estimate <= 0.05
        assert edits[arm].verdict != "supported"
        assert report.finding(f"sufficiency.{arm}").estimate < 0.8
    assert report.finding("interpretable.task").verdict == "supported"
    assert report.finding("interpretable.random").verdict != "supported"  # its own null
    more = report.tables["edits"].where(attribute="io", dictionary="task", kind="greedy").records()
    by_budget = {row["features"]: row["accuracy"] for row in more}
    assert by_budget[1] < by_budget[2] < by_budget[8]
    assert by_budget[8] >= 0.95


@pytest.mark.slow
def test_attributes_the_answer_state_does_not_use_are_not_counted_as_edited(report: "Report") -> None:
    """Without any edit the answers agree, so the study says that it cannot tell; agreement of 1 is no success."""
    for name in ("s", "position"):
        assert report.tables["edits"].where(attribute=name, dictionary="none").column("accuracy")[0] >= 0.95
        for arm in ("supervised", "task", "random"):
            assert report.finding(f"edit.{name}.{arm}").verdict == "not tested"
    explained = {row["attribute"]: row for row in report.tables["attributes"].records()}
    assert explained["io"]["explained"] > 0.3
    assert explained["position"]["explained"] <= 0.01


@pytest.mark.slow
def test_numbers_of_the_report_by_hand(report: "Report", chat: "HookedModel") -> None:
    """Sufficiency and the edit of the skyline again, with a Patch for each and least squares by numpy."""
    import numpy as np

    import subspace_probe as sp
    from subspace_probe.interventions.conditions import outcomes
    from subspace_probe.metrics import metric_for

    site, names = sp.Site(3, "resid_mid"), ("io", "s", "position")
    train, test = (
        sp.load_contrast("organism:chat/ioi", split=part, n=n, seed=0) for part, n in (("train", 600), ("test", 112))
    )
    acts = [chat.capture(part, sites=site).at(site).double().numpy() for part in (train, test)]
    design = [
        np.concatenate([np.eye(16)[list(c.factors["io"])], np.eye(16)[list(c.factors["s"])],
                        np.eye(2)[list(c.factors["position"])], np.ones((len(c), 1))], axis=1)
        for c in (train, test)
    ]  # fmt: skip
    codes = np.linalg.lstsq(design[0], acts[0], rcond=None)[0]
    made = torch.from_numpy(design[1] @ codes).float()
    patch = sp.Patch(sp.Source({site: made}, torch.arange(len(test)), sp.LAST, len(test)))
    values = outcomes(chat, test.prompts, [None, patch], [metric_for("logit_difference", chat)])[0]
    by_hand = float(values[1].mean() / values[0].mean())
    assert report.finding("sufficiency.supervised").estimate == pytest.approx(by_hand, abs=1e-4)
    assert names == tuple(report.tables["attributes"].column("attribute"))


@pytest.mark.slow
def test_the_report_survives_json_and_draws(report: "Report") -> None:
    import subspace_probe as sp

    again = sp.Report.from_json(report.to_json())
    assert [f.name for f in again.findings] == [f.name for f in report.findings]
    assert {"edits", "patch_sweep"} <= set(sp.figures.draw(again))
    for finding in report.findings:
        assert finding.verdict in ("supported", "refuted", "inconclusive", "not tested"), finding


def test_partners_differ_in_one_attribute_only() -> None:
    from subspace_probe.studies.sae_evaluation_prompts import partners

    columns = {"io": torch.tensor([0, 1, 0, 2, 1]), "s": torch.tensor([5, 5, 6, 6, 7])}
    rows, other = partners(columns, "io", seed=0)
    assert rows.tolist() == [0, 1, 2, 3]  # the last has no prompt with the same s
    assert other.tolist() == [1, 0, 3, 2]


@pytest.mark.slow
def test_what_a_users_model_lacks_is_said() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError, DataError, SiteError, UnknownName
    from subspace_probe.organisms import organism_contrast, organism_path
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("sae_evaluation")
    model = sp.load_model(organism_path("chat"))
    contrast = organism_contrast("chat/ioi", split="train", n=200)
    few = {"n_train": 60, "n_validation": 40, "n_test": 60}
    with pytest.raises(ConfigError, match="draws=0"):
        study.run(model, study.Config(draws=0))
    with pytest.raises(ConfigError, match="needs prompts"):
        study.run(model, study.Config())
    with pytest.raises(ConfigError, match="No autoencoders were given"):
        study.run(model, study.Config(**few), contrast=contrast)
    with pytest.raises(UnknownName, match="place"):
        study.run(model, study.Config(**few, attributes=("place",)), contrast=contrast)
    bare = contrast.map(lambda prompt: sp.Prompt(messages=prompt.messages))
    with pytest.raises(DataError, match="no 'answer'"):
        study.run(model, study.Config(**few), contrast=bare)
    folder = organism_path("chat").parent / "autoencoders" / "chat-task"
    with pytest.raises(SiteError, match="was trained at"):
        study.run(model, study.Config(**few, site="L3.resid_post", saes=(f"task={folder}",)), contrast=contrast)


@pytest.mark.slow
def test_a_users_model_and_prompts() -> None:
    """The same weights without their name, the prompts as a user's, and no autoencoders."""
    import subspace_probe as sp
    from subspace_probe.organisms import organism_contrast, organism_path
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("sae_evaluation")
    contrast = organism_contrast("chat/ioi", split="train", n=700)
    config = study.Config(
        n_train=400, n_validation=40, n_test=100, draws=3, budgets=(2,), attributes=("io", "s"), saes=("none",)
    )
    report = study.run(sp.load_model(organism_path("chat")), config, contrast=contrast, progress=False)
    assert report.finding("sufficiency.supervised").estimate > 0.9
    assert report.finding("sufficiency.supervised").expected is None  # nothing is known of a user's model
    assert report.finding("sufficiency.supervised").verdict == "unaudited"  # three draws are no null


@pytest.mark.slow
@pytest.mark.parametrize(("site", "carries"), [("L3.resid_mid", True), ("L0.mlp_out", False)])
def test_a_site_that_was_asked_for_is_checked_too(chat: "HookedModel", site: str, carries: bool) -> None:
    from subspace_probe.studies import STUDIES
    from subspace_probe.studies.sae_evaluation_prompts import RESTORED, find_cross_section, parts_of

    study = STUDIES.load("sae_evaluation")
    sizes = {"n_train": 300, "n_validation": 40, "n_test": 60}
    config = study.Config(**sizes, site=site, saes=("none",), draws=1, budgets=(2,), attributes=("io", "s"))
    found, restored, _ = find_cross_section(chat, parts_of(chat, config, None).validation, config)
    assert found.short == site
    assert (restored >= RESTORED) == carries
    said = study.run(chat, config, progress=False).tables["summary"].column("sentence")[0]
    assert ("at last carries the answer" in said) == carries
    assert ("was asked for and does not carry the answer" in said) == (not carries)
