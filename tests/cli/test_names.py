"""A contrast of one's own on a real model, through the command alone: girls' and boys' names in story openings."""

from pathlib import Path

import pytest

from tests.cli.conftest import Cli

pytestmark = pytest.mark.slow


def test_girls_and_boys(cli: Cli, stories_folder: Path, names: Path) -> None:
    import subspace_probe as sp

    found = cli(
        "find", "--model", stories_folder, "--contrast", names.name, "--finder", "mean_difference",
        "--site", "resid_post", "--where", "last", "--out", "direction.safetensors",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    direction = sp.Subspace.load("direction.safetensors")
    assert direction.found
    assert direction.notes["test_auroc"] >= 0.9

    steered = cli(
        "steer", "--model", stories_folder, "--direction", "direction.safetensors", "--strength", "-1,1,2",
        "--contrast", names.name, "--where", "last", "--answer", "She", "--foil", "He", "--out", "report",
        "--show", 1, "--max-new-tokens", 12,
    )  # fmt: skip
    assert steered.exit_code == 0, steered.output
    report = sp.Report.load("report/report.json")
    back, once, twice = (report.finding(f"logit_difference.{dose}") for dose in ("-1", "+1", "+2"))
    for finding in (back, once, twice):
        assert finding.verdict == "supported"
        assert finding.interval
        assert finding.null
    # towards She with the girls' names, towards He against them, each beyond every random direction's range
    assert once.interval.low > 2 * once.null.high > 0
    assert back.interval.high < 2 * back.null.low < 0
    assert twice.estimate > once.estimate
    # and the continuation itself changes: a boys' opening goes on with She
    opening = "Once upon a time, there was a little child named Tim."
    model = sp.load_model(str(stories_folder))
    she, he = model.token_ids(["She", "He"])
    clean = model.logits([opening])[0]
    moved = model.logits([opening], interventions=[sp.Steer(direction, 2.0, where=sp.LAST)])[0]
    assert clean[he] > clean[she]
    assert moved[she] > moved[he]
