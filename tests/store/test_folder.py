"""Captures into a folder: never computed twice, taken up where they were interrupted, never mixed with others."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.models.tiny import LAYERS, text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [text(2 + i % 7, seed=i) for i in range(40)]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> "HookedModel":
    """A tiny model whose captures have a shard every few prompts."""
    from subspace_probe.models import capturing, load_model

    monkeypatch.setattr(capturing, "PART_BYTES", 2048)
    return load_model(tiny("llama"), tokenizer=words())


def counted(model: "HookedModel", monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """The sizes of the passes that run from now on; a pass too many raises KeyboardInterrupt."""
    run, passes = model.backend.run, list[int]()

    def counting(batch: Any, **kwargs: Any) -> Any:
        if stop_after is not None and len(passes) == stop_after:
            raise KeyboardInterrupt
        passes.append(batch.size)
        return run(batch, **kwargs)

    monkeypatch.setattr(model.backend, "run", counting)
    return passes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def capture(model: "HookedModel", folder: Path | None, prompts: Any = PROMPTS, **kw: Any) -> Any:
    from subspace_probe.core.captures import Memory
    from subspace_probe.store import Folder

    options = {"where": "all", "batch_tokens": 24} | kw
    return model.capture(prompts, into=Memory() if folder is None else Folder(folder), **options)


def test_a_folder_holds_what_memory_holds(model: "HookedModel", tmp_path: Path) -> None:
    disk, memory = capture(model, tmp_path / "acts"), capture(model, None)
    assert len(list((tmp_path / "acts").glob("shard-*"))) > 5
    assert disk.sites == memory.sites
    assert len(disk.sites) == LAYERS
    for site in memory.sites:
        assert torch.equal(disk.at(site), memory.at(site))
    assert torch.equal(disk.prompt, memory.prompt)
    assert torch.equal(disk.position, memory.position)
    assert disk.notes == memory.notes


@pytest.mark.slow
def test_finders_make_no_difference_between_them(model: "HookedModel", tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.finders import FINDERS

    prompts = tuple(Prompt(f"w{3 + 9 * (i % 2)} {text(4, seed=i)}") for i in range(40))
    contrast = Contrast("c", prompts, tuple(i % 2 for i in range(40)))
    disk, memory = (capture(model, into, contrast) for into in (tmp_path / "acts", None))
    for name in FINDERS:
        if name == "sae_latents":  # needs a dictionary; contracts/test_finders.py gives it one
            continue
        found, wanted = (FINDERS.load(name)().fit(acts, Site(1)) for acts in (disk, memory))
        assert torch.allclose(found.basis, wanted.basis, rtol=0, atol=1e-6)
        assert torch.allclose(found.scale, wanted.scale, rtol=1e-5)


def test_the_same_capture_is_not_computed_twice(
    model: "HookedModel", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_probe.models import load_model

    first = capture(model, tmp_path / "acts")
    before = contents(tmp_path / "acts")
    again = load_model(tiny("llama"), tokenizer=words())
    passes = counted(again, monkeypatch)
    # whatever the batches are now: a whole capture is whole
    second = capture(again, tmp_path / "acts", batch_tokens=500)
    assert passes == []
    assert contents(tmp_path / "acts") == before
    for site in first.sites:
        assert torch.equal(first.at(site), second.at(site))


def test_other_labels_are_no_other_capture(
    model: "HookedModel", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.store import open_activations

    contrast = Contrast("c", tuple(map(Prompt, PROMPTS)), tuple(i % 2 for i in range(40)))
    capture(model, tmp_path / "acts", contrast)
    passes = counted(model, monkeypatch)
    other = replace(contrast, labels=tuple(i // 20 for i in range(40)))
    acts = capture(model, tmp_path / "acts", other)
    assert passes == []
    assert torch.equal(acts.labels, torch.tensor(other.labels)[acts.prompt])
    assert torch.equal(open_activations(tmp_path / "acts").labels, acts.labels)


@dataclass(frozen=True, eq=False)
class Shift:
    """An intervention that adds a number at one layer."""

    by: float
    subspace: Any

    @property
    def where(self) -> Any:
        from subspace_probe.core.tokens import ALL

        return ALL

    def edits(self, n_layers: int) -> Any:
        from subspace_probe.core.sites import Site

        return {Site(0): lambda x, ctx: x + self.by}

    def parts(self, n_layers: int) -> Any:
        return []

    def with_subspace(self, subspace: Any) -> Any:
        return replace(self, subspace=subspace)


def test_whatever_the_rows_depend_on_is_in_the_key(model: "HookedModel", tmp_path: Path) -> None:
    from subspace_probe.core.errors import StaleStore
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.models import load_model

    line = Subspace.span(torch.ones(1, 32))
    folder = tmp_path / "acts"
    capture(model, folder, interventions=[Shift(1.0, line)])
    capture(model, folder, interventions=[Shift(1.0, Subspace.span(torch.ones(1, 32)))])
    with model.intervened(Shift(1.0, line)) as standing:
        capture(standing, folder)
    before = contents(folder)
    shift = {"interventions": [Shift(1.0, line)]}
    other = load_model(tiny("llama", rope_theta=500.0, initializer_range=0.2), tokenizer=words())
    cases: dict[str, tuple[HookedModel, Any, dict[str, Any]]] = {
        "interventions": (model, PROMPTS, {}),
        "interventions ": (model, PROMPTS, {"interventions": [Shift(2.0, line)]}),
        "interventions  ": (model, PROMPTS, {"interventions": [Shift(1.0, Subspace.span(torch.randn(1, 32)))]}),
        "model": (other, PROMPTS, shift),
        "prompts, tokens": (model, [*PROMPTS[1:], PROMPTS[0]], shift),
        "sites": (model, PROMPTS, shift | {"sites": Site(1)}),
        "positions": (model, PROMPTS, shift | {"where": "last"}),
        "dtype": (model, PROMPTS, shift | {"dtype": torch.bfloat16}),
    }
    for what, (asked, prompts, kw) in cases.items():
        with pytest.raises(StaleStore, match=rf"holds other activations: its {what.strip()} differ\."):
            capture(asked, folder, prompts, **kw)
        assert contents(folder) == before
    with pytest.raises(StaleStore, match="its model, positions differ"):
        capture(other, folder, **shift | {"where": "last"})


def test_an_intervention_without_contents_is_refused_on_disk_only(model: "HookedModel", tmp_path: Path) -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.subspaces import Subspace

    opaque = Shift(by=lambda: 1.0, subspace=Subspace.span(torch.ones(1, 32)))
    with pytest.raises(ConfigError, match="A function has no content key"):
        capture(model, tmp_path / "acts", interventions=[opaque])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("passes", [0, 1, 7])
def test_an_interrupted_capture_goes_on_with_identical_bytes(
    model: "HookedModel", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    from subspace_probe.core.errors import StaleStore, StoreError
    from subspace_probe.store import open_activations

    capture(model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        counted(model, patch, stop_after=passes)
        with pytest.raises(KeyboardInterrupt):
            capture(model, tmp_path / "acts")
    kept = contents(tmp_path / "acts")
    shards = {name: data for name, data in kept.items() if name.startswith("shard")}
    assert bool(shards) == (passes > 1)
    assert not {name for name in kept if name.startswith(".")}
    with pytest.raises(StoreError, match=r"of the \d+ shards in .* are missing, .* interrupted"):
        open_activations(tmp_path / "acts")
    with pytest.raises(StaleStore, match="made with other batch_tokens"):
        capture(model, tmp_path / "acts", batch_tokens=500)
    with monkeypatch.context() as patch:
        sizes = counted(model, patch)
        capture(model, tmp_path / "acts")
    assert sum(sizes) < len(PROMPTS) or not shards
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


def test_a_capture_does_not_build_on_a_damaged_shard(
    model: "HookedModel", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_probe.core.errors import StoreError

    capture(model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        counted(model, patch, stop_after=7)
        with pytest.raises(KeyboardInterrupt):
            capture(model, tmp_path / "acts")
    shard = tmp_path / "acts/shard-00001.safetensors"
    good = shard.read_bytes()
    for bad in (
        good[:-1] + bytes([good[-1] ^ 1]),
        good[:-9],
        b"",
        (tmp_path / "whole/shard-00002.safetensors").read_bytes(),
    ):
        shard.write_bytes(bad)
        with pytest.raises(StoreError, match=r"shard-00001\.safetensors"):
            capture(model, tmp_path / "acts")
        assert shard.read_bytes() == bad
    shard.unlink()
    capture(model, tmp_path / "acts")
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


def test_two_captures_at_once_are_refused(model: "HookedModel", tmp_path: Path) -> None:
    from filelock import FileLock

    from subspace_probe.core.errors import StoreError

    (tmp_path / "acts").mkdir()
    with FileLock(tmp_path / "acts/.lock"), pytest.raises(StoreError, match="Another capture is being recorded"):
        capture(model, tmp_path / "acts")
    capture(model, tmp_path / "acts")
    assert not (tmp_path / "acts/.lock").exists()


def test_a_file_is_no_folder(model: "HookedModel", tmp_path: Path) -> None:
    from subspace_probe.core.errors import StoreError

    (tmp_path / "acts").write_text("mine")
    with pytest.raises(StoreError, match="Cannot write into"):
        capture(model, tmp_path / "acts")
    assert (tmp_path / "acts").read_text() == "mine"


@pytest.mark.slow
def test_a_capture_killed_five_times_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "tests/store/killed_captures.py")]
    for name, kills in {"whole": 0, "killed": 5}.items():
        done = subprocess.run(
            [*script, str(tmp_path / name), str(kills)],
            cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    whole = json.loads(done.stdout)
    assert len(whole) == 5
    assert whole == sorted(whole)
    assert 0 < whole[-1] < len(list((tmp_path / "whole").glob("shard-*"))), "kills fell before or behind all the work"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
