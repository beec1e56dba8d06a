"""`steer` with a unit, a kept norm, a request in words and a rule: the report is the library's."""

from pathlib import Path

import pytest

from tests.cli.conftest import Cli


@pytest.fixture
def direction(tmp_path: Path) -> str:
    """A random direction of the tiny model's width."""
    import torch

    import subspace_probe as sp

    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    sp.Subspace.span(vector, site=sp.Site(0)).save(tmp_path / "direction.safetensors")
    return "direction.safetensors"


@pytest.mark.slow
def test_the_options_are_the_librarys(cli: Cli, tiny: Path, colours: Path, direction: str) -> None:
    import subspace_probe as sp
    from subspace_probe.diagnostics.strengths import strength_sweep
    from subspace_probe.interventions.rules import Score

    result = cli(
        "steer", "-m", tiny, "-d", direction, "-s", "0.5,2,-1", "-c", colours.name, "--answer", "She", "--foil", "He",
        "--random", 3, "--show", 2, "--max-new-tokens", 4, "--out", "report", "-q",
        "--unit", "norm", "--keep-norm", "--words", "the green", "--keep-going",
        "--when", direction, "--threshold", "-0.01", "--decided-at", "last",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = sp.Report.load("report/report.json")
    model, found = sp.load_model(str(tiny)), sp.Subspace.load(direction)
    contrast = sp.load_contrast(colours.name)
    asked = contrast.map(lambda prompt: sp.Prompt(prompt.text, answer="She", foil="He"))
    rule = Score(found, -0.01, where=sp.LAST)
    steer = sp.Steer(found, unit="norm", keep_norm=True, when=rule)
    wanted = strength_sweep(
        model, steer, asked, "logit_difference", [0.5, 2.0, -1.0], draws=3, words="the green", show=2,
        max_new_tokens=4, stop=False,
    )  # fmt: skip
    assert [finding.name for finding in report.findings] == [
        "logit_difference.+0.5", "logit_difference.-1", "logit_difference.+2", "logit_difference.words",
        "control.integrity",
    ]  # fmt: skip
    for ours, theirs in zip(report.findings, wanted.findings, strict=True):
        assert ours.estimate == pytest.approx(theirs.estimate, abs=1e-6)
    assert report.tables.keys() == wanted.tables.keys()
    assert report.tables["completions"] == wanted.tables["completions"]
    config = report.provenance.config
    assert (config["unit"], config["words"], config["when"]) == ("norm", "the green", direction)
    assert "norm kept, when Score(score >= -0.01" in config["steering"]
    assert "in units" not in Path("report/report.html").read_text()
    assert "as a share of each state" in Path("report/report.html").read_text()


def test_without_random_directions_and_without_texts(cli: Cli, tiny: Path, colours: Path, direction: str) -> None:
    result = cli(
        "steer", "-m", tiny, "-d", direction, "-s", "1", "-c", colours.name, "--answer", "She", "--foil", "He",
        "--random", 0, "--show", 0, "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "unaudited" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--unit", "norms"], "Unknown unit 'norms'. Did you mean 'norm'?"),
        (["--strength", "0"], "No strength but 0 was given"),
        (["--when", "none.safetensors"], "No file 'none.safetensors'"),
        (["--when", "direction.safetensors", "--decided-at", "all"], "'all' is not one token"),
    ],
)
def test_what_is_wrong_is_said(cli: Cli, tiny: Path, direction: str, options: list[str], message: str) -> None:
    given = ["-m", tiny, "-d", direction, "-p", "the dog", "--max-new-tokens", 2, "-q"]
    result = cli("steer", *given, *(options if "--strength" in options else ["-s", "1", *options]))
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())
