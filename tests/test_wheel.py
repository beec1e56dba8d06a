"""The wheel is complete: installed alone, away from the sources, it makes a report with its own weights."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "subspace_probe"
# needs weights, tokenizer, prompts, and what pages are made of; the study itself is run by tests/studies
PATCH = (
    "patch", "--model", "organism:chat", "--contrast", "organism:chat/requests", "--limit", "8",
    "--site", "L2.resid_post", "--where", "t_post_inst", "--metric", "refusal_score",
)  # fmt: skip


def call(*command: object, cwd: Path, **environment: str) -> str:
    """Run `command`; its output, or a failure that shows all it said."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # No isolation: the backend is in the dev extra, so building asks nothing of a network.
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (built,) = folder.glob("subspace_probe-*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in {".py", ".safetensors", ".json", ".jsonl"} or path.name == "py.typed"
    }
    assert any(name.endswith(".safetensors") for name in wanted), "no weights in the source tree: nothing to check"
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_a_report_is_made_from_the_wheel_alone(target: Path, tmp_path: Path) -> None:
    elsewhere = {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    origin = call(
        sys.executable, "-c", "import subspace_probe; print(subspace_probe.__file__)", cwd=tmp_path, **elsewhere
    )
    assert Path(origin.strip()).is_relative_to(target), "the test would run the sources, not the wheel"

    out = tmp_path / "report"
    call(sys.executable, "-m", "subspace_probe", *PATCH, "--out", out, cwd=tmp_path, **elsewhere)
    assert json.loads((out / "report.json").read_text())["findings"]
    assert "plotly" in (out / "report.html").read_text(encoding="utf-8")


def test_without_its_weights_the_same_command_fails(target: Path, tmp_path: Path) -> None:
    """The control: the report above can only have read the weights inside the target."""
    moved = [(path, path.with_suffix(".gone")) for path in target.rglob("*.safetensors")]
    for path, away in moved:
        path.rename(away)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "subspace_probe", *PATCH, "--out", str(tmp_path / "report")],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            timeout=600,
            check=False,
        )
    finally:
        for path, away in moved:
            away.rename(path)
    assert moved
    assert done.returncode != 0
