"""Subspaces: what may be one, what it computes, and files that come back whole or not at all."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from subspace_probe.core.subspaces import Subspace


def vectors(k: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(k, d, generator=torch.Generator().manual_seed(seed))


def subspace(k: int = 2, d: int = 6) -> "Subspace":
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import T_INST

    notes = {"fingerprint": "abc123", "model": "tiny", "settings": {"paired": True, "levels": [0.5, 1]}}
    return Subspace.span(vectors(k, d), origin=vectors(1, d, 9)[0], site=Site(3, "z", 1), where=T_INST, notes=notes)


# --------------------------------------------------------------------------------------------------------- construction
def test_a_span_is_orthonormal_and_remembers_lengths_and_signs() -> None:
    from subspace_probe.core.subspaces import Subspace

    rows = vectors(3) * torch.tensor([[1.0], [100.0], [0.01]])
    made = Subspace.span(rows)
    assert torch.allclose(made.basis @ made.basis.T, torch.eye(3), atol=1e-6)
    assert torch.allclose(made.scale, rows.norm(dim=1))
    inside = rows @ made.basis.T @ made.basis
    assert torch.allclose(inside, rows, atol=1e-4)
    assert torch.all((made.basis * rows).sum(1) > 0)
    single = Subspace.span(-rows[0])
    assert torch.allclose(single.vector, -rows[0], atol=1e-6)
    assert torch.allclose(single.unit, -rows[0] / rows[0].norm(), atol=1e-6)
    assert torch.equal(made.origin, torch.zeros(6))


def test_what_is_no_subspace_is_refused() -> None:
    from subspace_probe.core.errors import RankError, ShapeError
    from subspace_probe.core.subspaces import Subspace

    x = vectors(1)[0]
    for dependent in (torch.stack([x, 2 * x]), torch.zeros(1, 6), vectors(7)):
        with pytest.raises(RankError, match="span no subspace of their number"):
            Subspace.span(dependent)
    with pytest.raises(ShapeError, match=r"not orthonormal .*Use Subspace.span"):
        Subspace(2 * x[None] / x.norm(), torch.ones(1), torch.zeros(6))
    with pytest.raises(ShapeError, match="non-finite"):
        Subspace(x[None] / x.norm(), torch.tensor([math.inf]), torch.zeros(6))
    with pytest.raises(RankError, match=r"the subspace has rank 2\. Use basis and scale"):
        _ = subspace(2).vector
    with pytest.raises(RankError, match="rank 2"):
        _ = subspace(2).unit


@pytest.mark.slow
def test_shapes_that_do_not_fit_are_named() -> None:
    """In a fresh process: the test run's own type checker would speak first."""
    import subprocess
    import sys

    code = (
        "import torch\n"
        "from subspace_probe.core.subspaces import Subspace\n"
        "Subspace(torch.eye(2, 6), torch.ones(3), torch.zeros(6))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "A basis of shape (2, 6) needs scale (2,) and origin (6,), found (3,) and (6,)" in found.stderr


def test_a_direction_without_length_still_has_a_unit() -> None:
    made = subspace(1).scaled(0.0)
    assert float(made.unit.norm()) == pytest.approx(1.0)
    assert float(made.vector.norm()) == 0.0


# ----------------------------------------------------------------------------------------------------------- arithmetic
def test_projections_are_taken_about_the_origin() -> None:
    made, x = subspace(2), vectors(5, seed=3)
    inside, outside = made.project(x), made.reject(x)
    assert torch.allclose(inside + outside, x, atol=1e-5)
    assert torch.allclose(made.coords(outside), torch.zeros(5, 2), atol=1e-5)
    assert torch.allclose(made.coords(x) @ made.basis, inside, atol=1e-5)
    assert torch.allclose(made.reject(made.origin), made.origin, atol=1e-5)


def test_overlap_and_cosine() -> None:
    from subspace_probe.core.subspaces import Subspace

    axes = torch.eye(6)
    assert Subspace.span(axes[:2]).overlap(Subspace.span(axes[1:3])) == pytest.approx(0.5)
    turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) @ axes[:2]
    assert Subspace.span(axes[:2]).overlap(Subspace.span(turned)) == pytest.approx(1.0)
    one, other = Subspace.span(axes[0]), Subspace.span(axes[0] - axes[1])
    assert one.cosine(other) == pytest.approx(math.sqrt(0.5))
    assert one.cosine(other.scaled(-2.0)) == pytest.approx(-math.sqrt(0.5))


def test_scaling_and_moving() -> None:
    from subspace_probe.core.sites import Site

    made = subspace(2)
    turned = made.scaled(-3.0)
    assert torch.allclose(turned.scale, 3 * made.scale)
    assert torch.equal(turned.basis, -made.basis)
    assert made.moved(Site(1)).site == Site(1)
    assert made.site == Site(3, "z", 1)


def test_directions_add_up_and_split_into_parts() -> None:
    from subspace_probe.core.errors import ConfigError, RankError
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace

    x, y = vectors(2, seed=4)
    a, b = (Subspace.span(v, site=Site(1), notes={"fingerprint": "f", "finder": n}) for v, n in ((x, "p"), (y, "q")))
    assert torch.allclose((a + b).vector, x + y, atol=1e-5)
    assert torch.allclose((a - 2.0 * b).vector, x - 2 * y, atol=1e-5)
    assert torch.allclose((-a).vector, -x, atol=1e-6)
    assert (a + b).notes["fingerprint"] == "f"
    assert [part["finder"] for part in (a + b).notes["parts"]] == ["p", "q"]
    inside, outside = a.split(b)
    assert inside is not None
    assert outside is not None
    assert torch.allclose(inside.vector + outside.vector, x, atol=1e-5)
    assert abs(float(outside.vector @ y)) < 1e-5
    assert abs(inside.cosine(b)) == pytest.approx(1.0, abs=1e-6)
    assert a.split(a)[1] is None
    assert outside.split(b)[0] is None
    for other, what in (
        (b.moved(Site(2)), "sites"),
        (b.with_scale([1.0], unit="weight"), "units"),
        (Subspace.span(y, site=Site(1), notes={"fingerprint": "g"}), "models"),
    ):
        with pytest.raises(ConfigError, match=f"Directions of different {what} cannot be added"):
            a + other
    with pytest.raises(RankError, match="rank 2"):
        subspace(2) + subspace(2)


def test_an_oblique_projector_reads_along_other_rows_than_it_writes() -> None:
    from dataclasses import replace

    from subspace_probe.core.errors import ConfigError, ShapeError
    from subspace_probe.core.subspaces import Subspace

    made = subspace(2)
    # any reader is the basis plus something the basis does not see
    extra = vectors(2, seed=8)
    extra = extra - extra @ made.basis.T @ made.basis
    oblique = replace(made, reader=made.basis + extra)
    x = vectors(5, seed=3)
    once = oblique.reject(x)
    assert torch.allclose(oblique.reject(once), once, atol=1e-5)
    assert torch.allclose(oblique.coords(once), torch.zeros(5, 2), atol=1e-5)
    assert not torch.allclose(once, made.reject(x), atol=0.1)  # control: it is another projector
    projector = oblique.basis.T @ oblique.readers
    assert torch.allclose(x - (x - oblique.origin) @ projector.T, once, atol=1e-5)
    assert torch.allclose(oblique.scaled(-1.0).reject(x), once, atol=1e-5)
    with pytest.raises(ShapeError, match="does not read its coordinates"):
        replace(made, reader=2 * made.basis)
    direction = replace(Subspace.span(x[0]), reader=Subspace.span(x[0]).basis.clone())
    for asked in (lambda: direction + direction, lambda: direction.split(made)):
        with pytest.raises(ConfigError, match="A subspace with a reader of its own cannot be"):
            asked()


def test_it_does_not_fit_other_widths_or_models() -> None:
    from subspace_probe.core.errors import ShapeError, StaleStore

    made = subspace(1)
    wide = subspace(1, 8)
    for call in (
        lambda: made.require_width(8),
        lambda: made.coords(torch.zeros(2, 8)),
        lambda: made.overlap(wide),
        lambda: made.cosine(wide),
    ):
        with pytest.raises(ShapeError, match="A subspace of width 6 was used where the activations have width 8"):
            call()
    made.require_model("abc123")
    made.for_any_model().require_model("other")
    made.moved(made.site).require_model("abc123")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        StaleStore, match=r"found in tiny \(fingerprint abc123\).*fingerprint other.*--allow-model-mismatch"
    ):
        made.require_model("other")
    type(made).span(vectors(1)).require_model("anything")  # of unknown origin


# ---------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("rank", [1, 3])
def test_a_file_gives_back_what_was_saved(tmp_path: Path, rank: int) -> None:
    from dataclasses import replace

    from subspace_probe.core.subspaces import Subspace

    for name, made in [
        ("a", subspace(rank)),
        ("b", replace(subspace(rank), site=None, where=None, found=False, notes={})),
        ("c", replace(subspace(rank), reader=subspace(rank).basis.clone(), scale_unit="gradient")),
    ]:
        path = made.save(tmp_path / "new" / f"{name}.safetensors")
        read = Subspace.load(path)
        for part in ("basis", "scale", "origin"):
            assert torch.equal(getattr(read, part), getattr(made, part))
        assert (read.site, read.where, read.found, read.notes) == (made.site, made.where, made.found, made.notes)
        assert read.scale_unit == made.scale_unit
        assert (read.reader is None) == (name != "c")
    assert sorted(file.stem for file in (tmp_path / "new").iterdir()) == ["a", "b", "c"]


def test_a_span_keeps_its_text_in_a_file(tmp_path: Path) -> None:
    from dataclasses import replace

    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import T_POST_INST, span

    for where in (span("the king: é"), T_POST_INST.offset(-2)):
        path = replace(subspace(), where=where).save(tmp_path / "a.safetensors")
        assert Subspace.load(path).where == where


def test_files_that_are_no_subspaces(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from subspace_probe.core.errors import StoreError
    from subspace_probe.core.subspaces import FORMAT, Subspace

    path = tmp_path / "x.safetensors"
    with pytest.raises(StoreError, match=r"No file .*Subspace.save"):
        Subspace.load(path)
    with pytest.raises(StoreError, match="not a readable safetensors file"):
        Subspace.load(tmp_path)
    path.write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="not a readable safetensors file"):
        Subspace.load(path)
    whole = subspace().save(tmp_path / "good.safetensors").read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(StoreError, match="not a readable safetensors file"):
        Subspace.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(StoreError, match=r"not a subspace of this package.*format None, tensors \['weight'\]"):
        Subspace.load(path)
    good = {"basis": torch.eye(2), "scale": torch.ones(2), "origin": torch.zeros(2)}
    header = {"format": FORMAT, "site": None, "head": None, "where": None, "found": True, "notes": {}}
    for tensors, changed in [
        (good | {"basis": torch.ones(2, 2)}, {}),
        (good, {"site": "L3.nowhere"}),
        (good, {"where": "nowhere"}),
        (good, {"format": "subspace-probe/subspace/0"}),
    ]:
        save_file(tensors, path, metadata={"subspace_probe": json.dumps(header | changed)})
        with pytest.raises(StoreError, match=r"is damaged|not a subspace of this package"):
            Subspace.load(path)
    for text in ("[]", "{", '{"format": "subspace-probe/subspace/1"}'):
        save_file(good, path, metadata={"subspace_probe": text})
        with pytest.raises(StoreError):
            Subspace.load(path)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    from dataclasses import replace

    from subspace_probe.core.errors import ConfigError, StoreError

    path = subspace().save(tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"notes\.bad holds a object"):
        replace(subspace(), notes={"bad": object()}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    for place in (tmp_path, path / "below" / "b.safetensors"):
        with pytest.raises(StoreError, match="Cannot write"):
            subspace().save(place)
    assert path.read_bytes() == before


def test_it_shows_itself() -> None:
    made = subspace(1)
    assert repr(made) == "Subspace(rank 1 of 6 at L3.z.h1, t_inst)"
    assert "<td>L3.z.h1</td>" in made._repr_html_()
    assert repr(type(made).span(vectors(2), found=False)) == "Subspace(rank 2 of 6, not found)"
