"""Activations on disk are the activations in memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from subspace_probe.core.activations import Activations


@pytest.fixture(params=["float32", "bfloat16", "float16", "float64"])
def acts(request: pytest.FixtureRequest) -> "Activations":
    """Two sites of forty rows, with pairs, groups, a factor and prompts of every kind."""
    from subspace_probe.core.activations import Activations, MemoryRows
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Message, Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import Where

    dtype = getattr(torch, request.param)
    generator = torch.Generator().manual_seed(0)
    turns = (Message(role="system", content="be brief"), Message(role="user", content="say hello"))
    prompts = [Prompt(text=f"prompt {i}", answer="yes", foil="no") for i in range(18)]
    prompts += [Prompt(messages=turns, instruction="hello"), Prompt(text="raw \u2028 naïve 水", raw=True)]
    contrast = Contrast(
        "mixed", tuple(prompts), tuple(i % 2 for i in range(20)), tuple(i // 2 for i in range(20)),
        tuple(i // 4 for i in range(20)), {"framing": tuple(i % 3 for i in range(20))},
    )  # fmt: skip
    sites = (Site(0), Site(1, "z", 2))
    shift = torch.arange(40)[:, None] % 4 >= 2
    rows = {site: (torch.randn(40, 8, generator=generator) + 2 * shift).to(dtype) for site in sites}
    return Activations(
        MemoryRows(rows), contrast, torch.arange(40) // 2, torch.arange(40) % 7, Where.parse("at+3"),
        {"model": "m", "fingerprint": "f"},
    )  # fmt: skip


def test_round_trip_is_exact(acts: "Activations", tmp_path: Path) -> None:
    from subspace_probe.store import open_activations, save_activations

    found = open_activations(save_activations(acts, tmp_path / "acts"))
    assert found.sites == acts.sites
    for site in acts.sites:
        assert found.at(site).dtype == acts.at(site).dtype
        assert torch.equal(found.at(site), acts.at(site))
        assert torch.equal(found.rows.read(site, 7, 23), acts.at(site)[7:23])
        assert found.rows.read(site, 5, 5).shape == (0, 8)
        assert torch.equal(found.rows.read(site, 30, 99), acts.at(site)[30:])
        assert found.rows.width(site) == 8
    for name in ("labels", "pairs", "groups", "prompt", "position"):
        assert torch.equal(getattr(found, name), getattr(acts, name))
    assert torch.equal(found.factor("framing"), acts.factor("framing"))
    assert (found.contrast, found.where, found.notes) == (acts.contrast, acts.where, acts.notes)
    assert sorted(path.name for path in (tmp_path / "acts").iterdir()) == ["manifest.json", "shard-00000.safetensors"]


def test_a_finder_sees_no_difference(acts: "Activations", tmp_path: Path) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.store import open_activations, save_activations

    stored = open_activations(save_activations(acts, tmp_path / "acts"))
    for finder in (MeanDifference(null_draws=0), MeanDifference(null_draws=0, paired=True)):
        memory, disk = (finder.fit(source, Site(0)) for source in (acts, stored))
        assert torch.equal(memory.vector, disk.vector)
        assert torch.equal(memory.origin, disk.origin)
        assert memory.notes == disk.notes


def test_many_shards_read_as_one(acts: "Activations", tmp_path: Path) -> None:
    """The format that captures which resume will write."""
    from subspace_probe.store import DiskRows, open_activations, save_activations
    from subspace_probe.store.shards import Shard, shard_name, write_shard

    folder = save_activations(acts, tmp_path / "acts")
    shards = [Shard(shard_name(i), start, stop) for i, (start, stop) in enumerate([(0, 11), (11, 11), (11, 40)])]
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in shards:
        part = {site: acts.at(site)[shard.start : shard.stop] for site in acts.sites}
        write_shard(folder / shard.file, part, key=manifest["key"], start=shard.start)
    manifest["shards"] = [{"file": s.file, "start": s.start, "stop": s.stop} for s in shards]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = open_activations(folder).rows
    assert isinstance(rows, DiskRows)
    for start, stop in ((0, 40), (0, 11), (10, 12), (11, 11), (12, 40)):
        assert torch.equal(rows.read(acts.sites[0], start, stop), acts.at(acts.sites[0])[start:stop])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "no manifest.json"),
        ("no manifest", "no manifest.json"),
        ("not json", "not a readable manifest"),
        ("a list", "is no manifest of activations"),
        ("foreign", "expected 'subspace-probe/activations/1', found 'zarr'"),
        ("no labels", "is damaged: KeyError 'labels'"),
        ("fewer positions", "3 position entries"),
        ("unlisted prompt", "not among the 20 listed"),
        ("elsewhere", "a shard outside the folder"),
        ("no shard", "1 of the 1 shards .* are missing, the first shard-00000.safetensors"),
        ("cut shard", "shard-00000.safetensors' is damaged"),
        ("other rows", "its manifest says"),
        ("other start", "from row 40 on"),
        ("other capture", "shard-00000.safetensors' belongs to another capture"),
        ("flipped bit", "are not those that were written"),
        ("bare shard", "not a shard of its manifest"),
        ("other sites", "cut short or not a shard of its manifest"),
    ],
)
@pytest.mark.parametrize("acts", ["float32"], indirect=True)
def test_what_cannot_be_read_is_named(acts: "Activations", tmp_path: Path, damage: str, message: str) -> None:
    import subspace_probe.core.errors as errors
    from subspace_probe.store import open_activations, save_activations
    from subspace_probe.store.shards import write_shard

    folder = tmp_path / "none" if damage == "no folder" else save_activations(acts, tmp_path / "acts")
    manifest, shard = folder / "manifest.json", folder / "shard-00000.safetensors"
    body = json.loads(manifest.read_text()) if folder.exists() else {}
    match damage:
        case "no manifest":
            manifest.unlink()
        case "not json":
            manifest.write_text("{")
        case "a list":
            manifest.write_text("[]")
        case "no shard":
            shard.unlink()
        case "cut shard":
            shard.write_bytes(shard.read_bytes()[:-9])
        case "other rows":
            write_shard(shard, {site: acts.at(site)[:9] for site in acts.sites}, key=body["key"], start=0)
        case "other sites":
            write_shard(shard, {acts.sites[0]: acts.at(acts.sites[0])}, key=body["key"], start=0)
        case "other start":
            write_shard(shard, {site: acts.at(site) for site in acts.sites}, key=body["key"], start=40)
        case "other capture":
            write_shard(shard, {site: acts.at(site) for site in acts.sites}, key="0" * 32, start=0)
        case "flipped bit":
            whole = bytearray(shard.read_bytes())
            whole[-1] ^= 1
            shard.write_bytes(whole)
        case "bare shard":
            save_file({site.short: acts.at(site) for site in acts.sites}, shard)
        case "no folder":
            pass
        case _:
            changed = {
                "foreign": {"format": "zarr"},
                "no labels": {"contrast": {"prompts": [{"text": "a"}], "name": ""}},
                "fewer positions": {"position": [1, 2, 3]},
                "unlisted prompt": {"prompt": [20] * 40},
                "elsewhere": {"shards": [{"file": "../shard.safetensors", "start": 0, "stop": 40}]},
            }[damage]
            manifest.write_text(json.dumps(body | changed))
    if damage == "flipped bit":  # only rows that are read are compared with their hash
        opened = open_activations(folder)
        with pytest.raises(errors.StoreError, match=message):
            [opened.rows.read(site, 0, 1) for site in acts.sites]
        return
    with pytest.raises(errors.StoreError, match=message):
        open_activations(folder)


@pytest.mark.parametrize("acts", ["float32"], indirect=True)
def test_nothing_half_written_stays(acts: "Activations", tmp_path: Path) -> None:
    import subspace_probe.core.errors as errors
    from subspace_probe.store import save_activations

    (tmp_path / "file").write_text("mine")
    with pytest.raises(errors.StoreError):
        save_activations(acts, tmp_path / "file")
    with pytest.raises(RuntimeError, match="the disk is gone"):
        save_activations(replace(acts, rows=_Broken(acts)), tmp_path / "acts")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class _Broken:
    """Rows whose disk fails while they are read."""

    def __init__(self, acts: "Activations") -> None:
        self.sites, self.n = acts.sites, acts.rows.n

    def width(self, site: object) -> int:
        return 8

    def read(self, site: object, start: int, stop: int) -> torch.Tensor:
        raise RuntimeError("the disk is gone")
