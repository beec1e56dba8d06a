"""Whole or not at all."""

from pathlib import Path

import pytest


def write_and_fail(path: Path) -> None:
    path.write_text("two")
    raise RuntimeError("midway")


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    from subspace_probe.core.files import atomic

    path = tmp_path / "deep" / "a.txt"
    with atomic(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError, match="midway"), atomic(path) as partial:
        write_and_fail(partial)
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_filled_only_when_it_is_complete(tmp_path: Path) -> None:
    from subspace_probe.core.files import atomic_folder

    folder = tmp_path / "out"
    with pytest.raises(RuntimeError, match="midway"), atomic_folder(folder) as partial:
        write_and_fail(partial / "a.txt")
    assert not folder.exists()
    with atomic_folder(folder) as partial:
        (partial / "a.txt").write_text("one")
        (partial / "b.txt").write_text("one")
    with pytest.raises(RuntimeError, match="midway"), atomic_folder(folder) as partial:
        write_and_fail(partial / "a.txt")
    with atomic_folder(folder) as partial:
        (partial / "b.txt").write_text("two")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a.txt": "one", "b.txt": "two"}


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    from subspace_probe.core.errors import StoreError
    from subspace_probe.core.files import atomic, atomic_folder

    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="it is a folder"), atomic(tmp_path):
        pass
    with pytest.raises(StoreError, match="Choose another place"), atomic(tmp_path / "file" / "a"):
        pass
    with pytest.raises(StoreError, match="it is a file"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(StoreError, match="Choose another folder"), atomic_folder(tmp_path / "file" / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
