"""The study against what is known to be true of the lineages."""

from typing import TYPE_CHECKING

import pytest
import torch

from tests.studies.notebooks import Executed, execute

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    return execute("safety_subspaces", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def report(executed: Executed) -> "Report":
    return executed.report


@pytest.mark.slow
def test_the_notebook(executed: Executed) -> None:
    executed.check()


@pytest.mark.slow
def test_nothing_is_found_where_harm_shares_everything_with_utility() -> None:
    """The control of the verdict: the same study on the family that has no subspace."""
    import subspace_probe as sp
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("safety_subspaces")
    found = study.run(sp.load_model("organism:entangled"), study.Config(**study.presets["tiny"]), progress=False)
    assert found.finding("selectivity").verdict == "refuted"
    assert found.finding("selectivity").estimate <= 0.60
    assert found.finding("selectivity.above_random").estimate <= 0
    assert not found.failures()


@pytest.mark.slow
def test_a_subspace_of_its_own_is_found_and_gives_the_useful_model_back(report: "Report") -> None:
    assert report.finding("selectivity").verdict == "supported"
    assert report.finding("selectivity").estimate >= 0.85
    assert report.finding("selectivity.above_random").estimate > 0
    assert report.finding("truth.useful_only_weights").estimate <= 1e-3
    assert abs(report.finding("truth.useful_only_harm").estimate) <= 0.05
    assert report.finding("overlap.weights.useful.harmful").estimate <= 0.02
    assert report.finding("instrument.mean_artefact").verdict == "supported"


@pytest.mark.slow
def test_a_model_of_ones_own_needs_another_checkpoint_and_gets_its_weights_compared() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.organisms import organism_path
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("safety_subspaces")
    model = sp.load_model("organism:override")  # no companions
    before = {name: value.clone() for name, value in model.backend.hf.named_parameters()}
    with pytest.raises(ConfigError, match="Set base="):
        study.run(model, study.Config(), progress=False)
    found = study.run(
        model, study.Config(base=str(organism_path("override-1")), useful="organism:override-2"), progress=False
    )
    assert found.finding("overlap.weights.alignment.useful").null is not None
    assert {row["what"] for row in found.tables["missing"].records()} == {"harmful", "contaminated", "behaviour"}
    assert all(torch.equal(before[name], value) for name, value in model.backend.hf.named_parameters())
