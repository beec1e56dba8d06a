"""Where results go: checked before the long work starts, written whole or not at all."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from subspace_probe.core.errors import StoreError

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report


def writable_file(path: Path) -> Path:
    """Check that a file can be written here, leaving nothing behind.

    Raises:
        StoreError: it cannot, and why.
    """
    if path.is_dir():
        raise StoreError(f"Cannot write {str(path)!r}: it is a folder. Give the name of a file.")
    _try(path.parent, path)
    return path


def writable_folder(path: Path) -> Path:
    """Check that files can be written into this folder, which need not exist yet, leaving nothing behind.

    Raises:
        StoreError: it cannot, and why.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"Cannot write into {str(path)!r}: it is a file. Choose a folder.")
    _try(path, path)
    return path


def _try(folder: Path, asked: Path) -> None:
    """Write a file into the nearest folder that exists, and remove it."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise StoreError(f"Cannot write {str(asked)!r}: {nearest}: {error.strerror}. Choose another place.") from None


def save_report(report: "Report", folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into a folder; both or neither.

    Returns:
        The two paths.
    """
    from subspace_probe.core.files import atomic_folder
    from subspace_probe.figures import save_html

    with atomic_folder(folder) as partial:
        report.save(partial / "report.json")
        save_html(report, partial / "report.html")
    return folder / "report.json", folder / "report.html"
