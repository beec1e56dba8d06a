"""The examples run, and say what their docstrings promise."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))

pytestmark = pytest.mark.slow


def test_there_are_examples() -> None:
    assert [path.name[:2] for path in SCRIPTS] == [f"{i:02d}" for i in range(1, len(SCRIPTS) + 1)]


@pytest.fixture
def said(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> str:
    """What a script prints."""
    from subspace_probe.organisms import organism_path

    if not (organism_path("chat") / "config.json").is_file():
        pytest.skip("the weights of organism:chat are not in this checkout")
    monkeypatch.chdir(tmp_path)  # some write their report
    monkeypatch.setattr("sys.argv", [str(FOLDER / request.param)])
    runpy.run_path(str(FOLDER / request.param), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("said", ["01_find_and_steer.py"], indirect=True)
def test_find_and_steer(said: str) -> None:
    lines = {line.split(":")[0].strip(): line for line in said.splitlines()}
    assert lines["as it is"].split(":")[1] == lines["random"].split(":")[1] != lines["steered"].split(":")[1]
    effect = next(line for line in said.splitlines() if "control.random" in line)
    assert effect.endswith("supported")


@pytest.mark.parametrize("said", ["02_audit_an_ablation.py"], indirect=True)
def test_audit_an_ablation(said: str) -> None:
    before, after = (
        [line for line in said.splitlines() if line.strip().startswith(f"{k}:")] for k in ("as it is", "ablated")
    )
    assert all("sorry" in line for line in before)
    assert all("sure" in line for line in after)
    verdicts = {line.split()[0]: line.split()[-1] for line in said.splitlines() if line.strip().startswith("control.")}
    assert verdicts["control.integrity"] == verdicts["control.random"] == "supported"


@pytest.mark.parametrize("said", ["03_harmfulness_and_refusal.py"], indirect=True)
def test_harmfulness_and_refusal(said: str) -> None:
    rates = {
        line[:32].strip(): [int(rate.rstrip("%")) for rate in line.split()[-2:]]
        for line in said.splitlines()
        if "%" in line
    }
    assert rates["as they are"] == [0, 0]
    judged, refused = rates["steered along harmfulness"]
    assert judged >= 95
    judged, refused = rates["steered along refusal"]
    assert judged <= 5
    assert refused >= 95


@pytest.mark.parametrize("said", ["04_compare_finders.py"], indirect=True)
def test_compare_finders(said: str) -> None:
    cosines = {line.split(":")[0].strip(): float(line.split("truth ")[1][:4]) for line in said.splitlines()[:5]}
    assert min(cosines[name] for name in ("mean_difference", "pca", "leace", "das")) > 0.85
    accuracy = {line.split(":")[0]: float(line.split(":")[1]) for line in said.splitlines() if line.startswith("DAS, ")}
    assert accuracy["DAS, accuracy"] > 0.95
    assert max(accuracy["DAS, control_labels"], accuracy["DAS, control_weights"]) < 0.75
    assert said.splitlines()[-1].endswith("valid for llama.cpp: True")


@pytest.mark.parametrize("said", ["05_patch_clamp_and_bake.py"], indirect=True)
def test_patch_clamp_and_bake(said: str) -> None:
    sweep = [line.split() for line in said.splitlines() if line.startswith("resid_pre")]
    at_last = [int(line[-1].rstrip("%")) for line in sweep]
    assert at_last[0] == 0
    assert at_last[3] >= 95
    assert all(abs(int(line[3].rstrip("%,"))) <= 1 for line in sweep)  # the intent word comes later
    shares = {line.split(":")[0]: line for line in said.splitlines() if "of the difference" in line}
    assert int(shares["one direction"].split()[2].rstrip("%")) >= 90
    memory, note = (line.split(": ")[1] for line in said.splitlines() if line.startswith("clamped to"))
    assert memory != note
    assert float(said.split()[-1]) < 1e-4


@pytest.mark.parametrize("said", ["06_is_it_an_illusion.py"], indirect=True)
def test_is_it_an_illusion(said: str) -> None:
    assert "planted: control supported, mechanism refuted" in said
    assert "stream: control supported, mechanism supported" in said
    assert said.count("changes the side of 100% of prompts") >= 2


@pytest.mark.parametrize("said", ["07_reroute_and_repair.py"], indirect=True)
def test_reroute_and_repair(said: str) -> None:
    rates = {line.split(":")[0]: line.split(":")[1].split()[0] for line in said.splitlines() if "% of prompts" in line}
    assert int(rates["before repair, target"].rstrip("%")) >= 90
    assert int(rates["before repair, random"].rstrip("%")) <= 20
    assert rates["after repair, target"] == "0%"
    found = next(line for line in said.splitlines() if line.startswith("found:"))
    planted = found.rpartition("planted: ")[2]
    assert planted in found.partition("planted")[0]
    assert float(said.splitlines()[-1].split()[-1].rstrip("%")) >= 99


@pytest.mark.parametrize("said", ["08_guard.py"], indirect=True)
def test_guard(said: str) -> None:
    assert "It takes at least 299." in said
    shares = {
        line.split(":")[0].strip(): [int(part.split("%")[0].split()[-1]) for part in line.split("%")[:-1]]
        for line in said.splitlines()
        if "the model refuses" in line
    }
    assert set(shares) == {"plain", "jailbreak", "strict"}
    assert all(caught >= 90 and stopped <= 5 for caught, stopped, _ in shares.values())
    assert shares["jailbreak"][2] == 0  # it answers, and is caught all the same
    numbers = {
        line.split(":")[0].strip(): float(line.split(":")[1].split()[0]) for line in said.splitlines() if "[" in line
    }
    assert numbers["auroc"] >= 0.98 > 0.95 > numbers["baseline.refusal_direction.auroc"]
    assert numbers["baseline.tfidf.auroc"] <= 0.7
    assert [line.split("flagged ")[1][:4] for line in said.splitlines()[-2:]] == ["Fals", "True"]
