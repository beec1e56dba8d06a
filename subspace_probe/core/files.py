"""Writing files whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from subspace_probe.core.errors import StoreError


@contextmanager
def atomic(path: Path) -> Generator[Path]:
    """A path beside `path` to write to; renamed to it when the block ends well, removed when it does not.

    Raises:
        StoreError: the folder does not exist or cannot be written.
    """
    if path.is_dir():
        raise StoreError(f"Cannot write {str(path)!r}: it is a folder. Give the name of a file.")
    made = _missing(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        _remove_empty(made)
        raise StoreError(f"Cannot write {str(path)!r}: {error.strerror}. Choose another place.") from None
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        if not path.exists():
            _remove_empty(made)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """A folder beside `path` to fill; its files are moved into `path` when the block ends well.

    Files of other names that already lie in `path` stay.

    Raises:
        StoreError: the place cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"Cannot write into {str(path)!r}: it is a file. Choose a folder.")
    made = _missing(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path, prefix=".partial."))
    except OSError as error:
        _remove_empty(made)
        raise StoreError(f"Cannot write into {str(path)!r}: {error.strerror}. Choose another folder.") from None
    done = False
    try:
        yield partial
        for file in partial.iterdir():
            if file.is_file():
                file.chmod(0o644)  # some writers let the owner alone read what they wrote
            file.replace(path / file.name)
        done = True
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not done:
            _remove_empty(made)


def _missing(folder: Path) -> list[Path]:
    """The folders that would have to be made, deepest first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # not made, or someone else has put something there
            continue
