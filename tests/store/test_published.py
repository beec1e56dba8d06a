"""Directions that others published, and the ways in which such files go wrong."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "refusal_direction"
PICKS = {
    "gemma-2b-it": (-2, 10, 10.064353277286578, (0.09754041, 0.03949568, 0.09052957)),
    "qwen-1_8b-chat": (-2, 15, 26.2872722793459, (0.33090750, -0.89652996, 1.25248751)),
}


def folder(model: str) -> Path:
    if not (PUBLISHED / model / "direction.pt").is_file():
        pytest.skip("the published directions are not in ../shared/data: this check against them needs them")
    return PUBLISHED / model


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("model", PICKS)
def test_the_published_direction_is_the_published_candidate(model: str, tmp_path: Path) -> None:
    import subspace_probe as sp

    position, layer, norm, first = PICKS[model]
    one = sp.import_direction(folder(model) / "direction.pt")  # the metadata beside it says where
    chosen = sp.import_direction(folder(model) / "mean_diffs.pt", position=position, layer=layer)
    assert torch.equal(one.basis, chosen.basis)
    assert torch.equal(one.scale, chosen.scale)
    assert one.site == chosen.site == sp.Site(layer, "resid_pre")
    assert one.where == chosen.where == sp.at(position)
    assert str(one.site) == f"blocks.{layer}.hook_resid_pre"
    assert one.notes["norm"] == pytest.approx(norm, rel=1e-14)
    assert float(one.scale[0]) == pytest.approx(norm, rel=1e-7)
    assert one.vector[:3].tolist() == pytest.approx(first, rel=1e-6, abs=1e-7)
    other = sp.import_direction(folder(model) / "mean_diffs.pt", position=-1, layer=layer)  # control
    assert not torch.equal(one.basis, other.basis)
    # the published file is a view that drags all its rivals along; ours is not
    saved = one.save(tmp_path / "one.safetensors")
    assert os.path.getsize(saved) < 4 * 2 * one.width + 4096 < os.path.getsize(folder(model) / "direction.pt") / 20
    assert torch.equal(sp.Subspace.load(saved).basis, one.basis)
    assert one.basis.untyped_storage().nbytes() <= 8 * one.width


@pytest.mark.parametrize("model", PICKS)
def test_candidates_at_the_embeddings_are_rounding_noise(model: str) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    for position in range(-5, 0):
        with pytest.raises(StoreError, match="is rounding noise: its length is"):
            sp.import_direction(folder(model) / "mean_diffs.pt", position=position, layer=0)
        assert sp.import_direction(folder(model) / "mean_diffs.pt", position=position, layer=1).found


@pytest.mark.filterwarnings("ignore:Found at")
def test_a_published_direction_reaches_llama_cpp(tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError

    one = sp.import_direction(folder("gemma-2b-it") / "direction.pt", model="google/gemma-2b-it")
    with pytest.raises(ConfigError, match=r"The same tensor is L9\.resid_post"):
        sp.export_gguf(one, tmp_path / "v.gguf")
    path = sp.export_gguf(one.moved(sp.Site(9)), tmp_path / "v.gguf", model_hint="gemma")
    assert sp.verify_gguf(path, n_embd=2048, n_layers=18) == replace(sp.verify_gguf(path), errors=(), warnings=())
    assert torch.equal(sp.import_gguf(path)[sp.Site(9)].vector, one.vector)


def test_shapes_sites_and_tokens(tmp_path: Path) -> None:
    import subspace_probe as sp

    one, rows, stack = numbers(16), numbers(9, 16), numbers(3, 8, 16)
    for name, tensor in {"one": one, "rows": rows, "stack": stack}.items():
        torch.save(tensor, tmp_path / f"{name}.pt")
    bare = sp.import_direction(tmp_path / "one.pt")
    assert (bare.site, bare.where) == (None, None)
    assert bare.notes == {
        "finder": "imported", "file": "one.pt", "shape": [16], "dtype": "float32", "norm": bare.notes["norm"]
    }  # fmt: skip
    assert bare.vector.tolist() == pytest.approx(one.tolist(), rel=1e-6)
    # hidden states: the embeddings, then what each block hands on
    for layer, site in ((0, sp.Site(0, "resid_pre")), (3, sp.Site(2)), (8, sp.Site(7))):
        found = sp.import_direction(tmp_path / "rows.pt", layer=layer, where=sp.T_INST)
        assert (found.site, found.where) == (site, sp.T_INST)
        assert found.vector.tolist() == pytest.approx(rows[layer].tolist(), rel=1e-6)
    found = sp.import_direction(tmp_path / "stack.pt", layer=7, position=-3, site=sp.Site(7), model="m")
    assert (found.site, found.where, found.notes["model"]) == (sp.Site(7), sp.at(-3), "m")
    assert found.vector.tolist() == pytest.approx(stack[0, 7].tolist(), rel=1e-6)
    # the metadata beside it fills in, what is given goes first
    (tmp_path / "direction_metadata.json").write_text('{"pos": -1, "layer": 4}')
    found = sp.import_direction(tmp_path / "stack.pt")
    assert found.vector.tolist() == pytest.approx(stack[2, 4].tolist(), rel=1e-6)
    assert sp.import_direction(tmp_path / "stack.pt", layer=5).site == sp.Site(5, "resid_pre")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_real_dtype_is_kept_in_float32_with_its_length(dtype: torch.dtype, tmp_path: Path) -> None:
    import subspace_probe as sp

    tensor = numbers(64, dtype=dtype) * 400  # in half precision, squares overflow
    torch.save(torch.nn.Parameter(tensor), tmp_path / "one.pt")
    safetensors.torch.save_file({"direction": tensor}, tmp_path / "one.safetensors")
    for path in ("one.pt", "one.safetensors"):
        found = sp.import_direction(tmp_path / path)
        assert found.basis.dtype == torch.float32
        assert found.notes["dtype"] == str(dtype).removeprefix("torch.")
        assert found.notes["norm"] == pytest.approx(np.linalg.norm(tensor.double().numpy()), rel=1e-14)
        assert found.vector.numpy() == pytest.approx(tensor.float().numpy(), rel=1e-6)


def _bad() -> dict[str, tuple[Any, dict[str, Any], str]]:
    holed = numbers(16)
    holed[3] = float("inf")
    return {
        "numpy": (np.ones(16, np.float16), {}, "runs code when it is read"),
        "dict": ({"layer_1": numbers(16), "layer_2": numbers(16)}, {}, "holds a dict with 'layer_1', 'layer_2'"),
        "list": ([1.0, 2.0], {}, "holds a list, not a tensor"),
        "integers": (torch.arange(16), {}, "is not of real numbers"),
        "complex": (torch.ones(16, dtype=torch.complex64), {}, "is not of real numbers"),
        "sparse": (torch.eye(4).to_sparse(), {}, "is not of real numbers"),
        "scalar": (torch.tensor(1.0), {}, r"has the shape \[\]"),
        "empty": (torch.empty(0), {}, r"has the shape \[0\]"),
        "4-d": (numbers(2, 2, 2, 4), {}, r"has the shape \[2, 2, 2, 4\]"),
        "zero": (torch.zeros(16), {}, "has the length 0"),
        "holed": (holed, {}, "non-finite"),
        "huge": (numbers(16, dtype=torch.float64) * 1e200, {}, "has the length inf"),
        "huge rows": (numbers(4, 16, dtype=torch.float64) * 1e200, {"layer": 1}, "rounding noise|has the length inf"),
        "no layer": (numbers(4, 16), {}, "give layer, 0 to 3, not None"),
        "far layer": (numbers(4, 16), {"layer": 4}, "give layer, 0 to 3, not 4"),
        "layer from the end": (numbers(4, 16), {"layer": -1}, "give layer, 0 to 3, not -1"),
        "no such block": (numbers(16), {"layer": -1}, "Count from the first block"),
        "no position": (numbers(3, 4, 16), {"layer": 1}, "give position, -3 to -1, counted from the end"),
        "position from the front": (numbers(3, 4, 16), {"layer": 1, "position": 0}, "give position, -3 to -1"),
        "far position": (numbers(3, 4, 16), {"layer": 1, "position": -4}, "give position, -3 to -1"),
    }


@pytest.mark.parametrize("case", _bad())
def test_refuses_what_is_no_direction(case: str, tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import SubspaceProbeError

    content, options, message = _bad()[case]
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(SubspaceProbeError, match=message):
        sp.import_direction(tmp_path / "bad.pt", **options)


def test_the_advice_for_a_pickle_with_code_works(tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    path = tmp_path / "numpy.pt"
    torch.save(np.arange(1, 17, dtype=np.float16).reshape(2, 8), path)
    with pytest.raises(StoreError) as caught:
        sp.import_direction(path, layer=1)
    lines = [line.strip().replace('"direction.safetensors"', "out") for line in str(caught.value).splitlines()[1:]]
    out = tmp_path / "direction.safetensors"
    exec("\n".join(lines), {"torch": torch, "safetensors": safetensors, "out": out})
    assert sp.import_direction(out, layer=1).vector.tolist() == pytest.approx(range(9, 17))


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save(Trap(), tmp_path / "trap.pt")
    with pytest.raises(StoreError, match="runs code when it is read"):
        sp.import_direction(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "trap.pt", weights_only=False)  # control
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"pos": -2}', '{"pos": "-2", "layer": 3}', '{"pos": -2, "layer": -1}'])
def test_metadata_that_is_none(text: str, tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    torch.save(numbers(16), tmp_path / "one.pt")
    (tmp_path / "direction_metadata.json").write_text(text)
    with pytest.raises(StoreError, match="Mend or remove it"):
        sp.import_direction(tmp_path / "one.pt")


def test_other_files(tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    with pytest.raises(StoreError, match="No file"):
        sp.import_direction(tmp_path / "none.pt")
    with pytest.raises(StoreError, match="No file"):
        sp.import_direction(tmp_path)
    own = sp.Subspace.span(numbers(16)).save(tmp_path / "own.safetensors")
    with pytest.raises(StoreError, match=r"Use Subspace.load"):
        sp.import_direction(own)
    safetensors.torch.save_file({"a": numbers(4), "b": numbers(4)}, tmp_path / "two.safetensors")
    with pytest.raises(StoreError, match="holds a dict with 'a', 'b'"):
        sp.import_direction(tmp_path / "two.safetensors")
    for content in (b"", b"hello world, this is no tensor", json.dumps({"a": 1}).encode()):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(StoreError, match=r"not a readable \.pt file"):
            sp.import_direction(tmp_path / "bad.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_and_damaged_files_are_refused_or_read(kind: str, tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    path, draw = tmp_path / "x.pt", random.Random(0)
    if kind == "safetensors":
        safetensors.torch.save_file({"direction": numbers(16)}, path)
    else:
        torch.save(numbers(16), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()

    def survives(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            sp.import_direction(path)
        except StoreError:
            return False
        return True

    assert survives(whole)
    assert not any(survives(whole[: len(whole) * i // 60]) for i in range(59))
    for _ in range(200):
        at = draw.randrange(len(whole))
        survives(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        survives(whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :])
