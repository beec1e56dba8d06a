"""`study` and `demo` against a study that does nothing but say what it was given."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import pytest

from tests.cli.conftest import Cli

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.reports import Report
    from subspace_probe.models.hooked import HookedModel


@dataclass(frozen=True)
class Config:
    """Somebody et al. 2024."""

    n_train: int = 128
    """Prompts per class."""
    strength: float = 1.0
    """How far. Raise it
    where nothing moves."""
    sites: str = "resid_post"
    sweep: tuple[float, ...] = (1.0, 2.0)
    mode: Literal["fast", "full"] = "fast"
    layer: int | None = None
    paired: bool = False
    seed: int = 0


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put a study `echo` in the place of the table; what it is called with comes back here."""
    from subspace_probe.core.findings import Expectation, Finding
    from subspace_probe.core.registry import Registry
    from subspace_probe.core.reports import Provenance, Report, Table
    from subspace_probe.studies.study import Study

    heard: dict[str, Any] = {}

    def run(
        model: "HookedModel", config: Config, *, contrast: "Contrast | None" = None, progress: bool = True
    ) -> "Report":
        heard.update(model=model, config=config, contrast=contrast, progress=progress)
        finding = Finding("rate.random", "nothing happens", 0.4, expected=Expectation(below=0.05))
        if config.strength == 3.0:
            finding = Finding("rate.random", "nothing happens", 0.01 * config.seed, expected=Expectation(below=0.05))
        tables = {"summary": Table(("sentence",), (("An answer.",),))}
        return Report("echo", (finding,), tables, Provenance.now(model=model.spec.name, seconds=3.0))

    presets: Mapping[str, Mapping[str, Any]] = {"tiny": {"n_train": 4, "strength": 2.0}}
    table = ModuleType("echo_study")
    table.__dict__["STUDY"] = Study(
        "Does it echo?", "Somebody 2024", Config, run, presets, {"loud": ("override", "override-1"), "low": ("robust",)}
    )
    monkeypatch.setitem(sys.modules, "echo_study", table)
    import subspace_probe.studies

    echo = Registry("study", {"echo": "echo_study:STUDY", "harmfulness": "echo_study:STUDY"})
    monkeypatch.setattr(subspace_probe.studies, "STUDIES", echo)
    return heard


@pytest.mark.slow
def test_settings_reach_the_study(cli: Cli, told: dict[str, Any], tiny: Path, colours: Path) -> None:
    result = cli(
        "study", "echo", "--model", tiny, "--contrast", colours.name, "--preset", "tiny", "--seed", 7,
        "--set", "n_train=9", "--set", "sweep=0.5, 1,2", "--set", "mode=full", "--set", "layer=3",
        "--set", "paired=yes", "--words", "refusal=Sorry,I", "--words", "harmful=yes", "--quiet", "--out", "r",
    )  # fmt: skip
    assert result.exit_code == 1, result.output  # one expectation is not met; the report is there all the same
    assert told["config"] == Config(9, 2.0, "resid_post", (0.5, 1.0, 2.0), "full", 3, True, 7)
    assert told["contrast"].name == "colours"
    assert told["model"].words == {"refusal": ("Sorry", "I"), "harmful": ("yes",)}
    assert told["progress"] is False
    assert sorted(path.name for path in Path("r").iterdir()) == ["report.html", "report.json"]
    assert "An answer." in result.stdout
    assert "! rate.random is 0.400, expected <= 0.05: nothing happens" in result.stdout
    assert "wrote r/report.html" in result.stdout


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ntrain=3", "Unknown setting of echo 'ntrain'. Did you mean 'n_train'?"),
        ("n_train=3.5", "--set n_train=3.5: a whole number was expected."),
        ("sweep=1,two", "--set sweep=1,two: a number, or several with commas was expected."),
        ("mode=slow", "--set mode=slow: fast or full was expected."),
        ("layer=x", "--set layer=x: a whole number or none was expected."),
        ("paired=2", "--set paired=2: true or false was expected."),
    ],
)
def test_settings_are_checked(cli: Cli, told: dict[str, Any], setting: str, message: str) -> None:
    result = cli("study", "echo", "--model", "./none", "--set", setting)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not told
    assert not Path("echo-report").exists()


def test_unknown_presets_and_empty_words(cli: Cli, told: dict[str, Any], tiny: Path) -> None:
    assert (
        "Unknown preset of echo 'tin'. Did you mean 'tiny'?"
        in cli("study", "echo", "-m", "x", "--preset", "tin").stderr
    )
    assert "--words refusal= names no words" in cli("study", "echo", "-m", tiny, "--words", "refusal=").stderr


def test_studies_are_listed(cli: Cli, told: dict[str, Any]) -> None:
    for args in (["study"], ["study", "--list"]):
        listed = cli(*args)
        assert listed.exit_code == 0
        assert "Does it echo?" in listed.stdout
    lines = [" ".join(line.split()) for line in cli("study", "echo", "--list").stdout.splitlines()]
    assert "n_train whole number 128 Prompts per class." in lines
    assert "strength number 1.0 How far. Raise it where nothing moves." in lines
    assert "preset tiny: n_train=4, strength=2.0" in lines
    assert not told


def test_the_demo_is_the_first_study(
    cli: Cli, told: dict[str, Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_probe.cli import demo

    monkeypatch.setattr(demo, "MODEL", str(tiny))
    result = cli("demo", "--out", "d", "--seed", 2)
    assert result.exit_code == 0, result.output
    assert told["config"] == Config(n_train=4, strength=2.0, seed=2)
    assert told["progress"] is True
    assert Path("d/report.html").is_file()


def test_seeds_run_on_the_organisms_of_the_preset(cli: Cli, told: dict[str, Any]) -> None:
    """Three seeds of two cases: six runs with a folder each, organisms taken in turn, and a report over all."""
    from subspace_probe.core.reports import Report

    result = cli("study", "echo", "--preset", "tiny", "--seeds", 3, "--set", "strength=3", "--out", "r", "--quiet")
    assert result.exit_code == 0, result.output
    report = Report.load("r/report.json")
    assert report.tables["runs"].column("model") == [
        "organism:override", "organism:override-1", "organism:override", *["organism:robust"] * 3,
    ]  # fmt: skip
    assert all(Path("r", page).is_file() for page in report.tables["runs"].column("page"))
    assert [finding.name for finding in report.findings] == ["loud.rate.random", "low.rate.random", "seeds.unmet"]
    assert report.finding("loud.rate.random").estimate == pytest.approx(0.01)
    assert report.provenance.config["seeds"] == [0, 1, 2]


def test_the_seed_is_no_setting(cli: Cli, told: dict[str, Any]) -> None:
    """Else all runs of --seeds would be one run, and their spread nothing."""
    result = cli("study", "echo", "--preset", "tiny", "--seeds", 2, "--set", "seed=5")
    assert result.exit_code == 2
    assert "Use --seed" in result.stderr
    assert not told


def test_one_seed_that_fails_is_not_outvoted(cli: Cli, told: dict[str, Any]) -> None:
    from subspace_probe.core.reports import Report

    args = ("study", "echo", "-m", "organism:override", "--seeds", 2, "--seed", 5, "--set", "strength=3", "-o", "r")
    assert cli(*args).exit_code == 1
    report = Report.load("r/report.json")
    assert report.finding("rate.random").estimate == pytest.approx(0.055)  # seeds 5 and 6: .05 is met, .06 is not
    assert report.finding("seeds.unmet").estimate == 1
    assert "rate.random at seed 6" in report.finding("seeds.unmet").note


def test_without_a_model_the_preset_must_bring_one(cli: Cli, told: dict[str, Any]) -> None:
    for args in ((), ("--preset", "none"), ("--seeds", 2)):
        result = cli("study", "echo", *args)
        assert result.exit_code == 2
        assert "No model was given for echo." in result.stderr
        assert "--preset tiny" in result.stderr
    assert not told
