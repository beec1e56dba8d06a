"""`organisms`: certificates as they are on disk, and training that leaves nothing half-made."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cli.conftest import Cli

if TYPE_CHECKING:
    from subspace_probe.organisms.truth import GroundTruth


def truth() -> "GroundTruth":
    import torch

    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import T_INST
    from subspace_probe.organisms.truth import GroundTruth, Planted, ReadableNotUsed

    vector = torch.eye(8)[0]
    planted = Planted("harmfulness", Site(1), T_INST, vector, {"plain": 1.0, "strict": 0.98}, {"plain": 0.02}, 200)
    unused = ReadableNotUsed("harmfulness", Site(2), T_INST, {"plain": 0.97}, {"L2": 0.01, "all": 0.03}, 200)
    behaviour = {"steered": {"judgement": 0.99}}
    return GroundTruth("chat", (planted,), unused, {"plain": 0.999}, behaviour, {"seed": 0, "start": ""})


def test_certificates_are_listed(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subspace_probe.organisms

    (tmp_path / "chat").mkdir()
    truth().save(tmp_path / "chat")
    monkeypatch.setattr(subspace_probe.organisms, "_WEIGHTS", tmp_path)
    listed = " ".join(cli("organisms", "list").stdout.split())
    assert "organism:chat" in listed
    assert "interchange 0.990 (random 0.020)" in listed
    assert "its weights are not in this installation" in listed  # those of the others
    for name in ("chat", "organism:chat", str(tmp_path / "chat")):
        result = cli("organisms", "show", name)
        assert result.exit_code == 0, result.output
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        assert "harmfulness L1.resid_post t_inst 0.990 0.980 0.020 200" in lines
        assert "harmfulness can be read at L2.resid_post, t_inst, but is not used there:" in lines
        assert "judgements changed by exchange: L2 0.010, all 0.030" in lines
        assert "steered: judgement 0.990" in lines
        assert ("organism:chat/requests" in result.stdout) == ("/" not in name)


def test_training_writes_all_or_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.organisms import training

    def train(name: str, out: Path, *, steps: int | None, seed: int, progress: bool, fail: bool = False) -> Path:
        assert (name, steps, seed, progress) == ("chat", 3, 4, False)
        (out / "model.safetensors").write_text("weights")
        if fail:
            raise KeyboardInterrupt
        return truth().save(out)

    args = ("organisms", "train", "chat", "--out", "made", "--steps", 3, "--seed", 4, "--quiet")
    monkeypatch.setattr(training, "train", lambda *a, **k: train(*a, **k, fail=True))
    assert cli(*args).exit_code == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(training, "train", train)
    result = cli(*args)
    assert result.exit_code == 0, result.output
    assert "harmfulness at L1.resid_post, t_inst: interchange 0.990 (random 0.020)" in result.stdout
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "model.safetensors", "truth.json", "truth.safetensors",
    ]  # fmt: skip


@pytest.mark.slow
def test_bundled_organisms_are_shown(cli: Cli) -> None:
    from subspace_probe.organisms import ORGANISMS, organism_path

    if not (organism_path("chat") / "truth.json").is_file():
        pytest.skip("the weights of organism:chat are not in this checkout")
    assert "not in this installation" not in cli("organisms", "list").stdout
    for name in ORGANISMS:
        assert cli("organisms", "show", name).exit_code == 0


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_an_organism_is_a_model_like_any_other(cli: Cli) -> None:
    """find on an organism's own prompts, at the position that carries its refusal."""
    import subspace_probe as sp
    from subspace_probe.organisms import organism_path

    if not (organism_path("chat") / "config.json").is_file():
        pytest.skip("the weights of organism:chat are not in this checkout")
    result = cli(
        "find",
        "-m",
        "organism:chat",
        "-c",
        "organism:chat/harmfulness",
        "--split",
        "train",
        "--where",
        "t_post_inst",
        "-q",
    )
    assert result.exit_code == 0, result.output
    assert sp.Subspace.load("direction.safetensors").notes["test_auroc"] >= 0.97
