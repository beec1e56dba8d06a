"""Judging JSON lines into a file, so that a run that was ended, however, can be taken up.

Beside the file lies a small record of what judges, the lines judged together, and the input so far. It is written
before the lines that it speaks of, so it never speaks of fewer than there are. An ended window is judged again as a
whole: scores depend in their last digits on what else was in the batch, so that only the same windows give the same
file to the byte.
"""

import hashlib
import json
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from filelock import FileLock, Timeout

from subspace_probe.core.errors import StaleStore, StoreError
from subspace_probe.core.files import atomic
from subspace_probe.core.keys import content_key
from subspace_probe.core.plain import plain
from subspace_probe.core.records import Columns
from subspace_probe.guard.jsonl import Counts, Scoring, Source, lines_of, windows_of

if TYPE_CHECKING:
    from subspace_probe.guard.guard import LatentGuard

FORMAT = "subspace-probe/guard-scores/1"
INSTEAD = "Choose another file, or write over it (--fresh)."


def score_file(scoring: Scoring, source: Source, out: Path, *, key: str, fresh: bool = False) -> Counts:
    """Judge every line of a stream into a file, going on where an earlier run into that file ended.

    Args:
        scoring: how. The window of the earlier run is kept.
        source: the input from its beginning. What an earlier run has judged is read again and compared, not judged.
        out: the file; `record_path` says where its record lies.
        key: of what judges, such as `guard_key(guard)`.
        fresh: write over what lies there.

    Returns:
        What this run has done.

    Raises:
        StaleStore: the file was made by another guard, from another input, or has been changed.
        StoreError: the file lies there without its record, cannot be written, or another run is writing into it.
        DataError: a line that cannot be judged, unless bad ones are skipped; those before its window are written.
    """
    with _alone(out):
        return _go_on(scoring, source, out, key, fresh=fresh)


def guard_key(guard: "LatentGuard", columns: Columns | None = None, *, skip_bad: bool = False) -> str:
    """Equal where the same would be said of every line: what the guard is, its numbers, the weights that it reads, and
    how lines are read."""
    parts = {"probe": guard.probe.tensors()}
    parts |= {} if guard.gate is None else {"gate": guard.gate.tensors()}
    parts |= {} if guard.calibration is None else {"calibration": dict(guard.calibration.numbers)}
    numbers = {
        f"{part}.{name}": (str(value.dtype), list(value.shape), value.tobytes())
        for part, held in parts.items()
        for name, value in held.items()
    }
    return content_key([plain(guard.describe()), numbers, guard.model.fingerprint, columns or Columns(), skip_bad])


def record_path(out: Path) -> Path:
    """Where the record of an output lies."""
    return out.with_name(f"{out.name}.state.json")


@final
@dataclass(frozen=True)
class Mark:
    """How far a run had come: it was writing the lines from `start` to `end` (exclusive).

    Attributes:
        key: of what judges.
        window: lines judged together.
        digest: of the input's first `end` lines; empty before the first.
    """

    key: str
    window: int
    start: int
    end: int
    digest: str

    def save(self, out: Path) -> None:
        """Write it beside the output."""
        with atomic(record_path(out)) as partial:
            partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, out: Path) -> "Mark":
        """Read the one beside the output.

        Raises:
            StoreError: none there, or a damaged one.
        """
        path = record_path(out)
        try:
            body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if body.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            mark = cls(**body)
            if not (0 <= mark.start <= mark.end and mark.window > 0):
                raise ValueError("its numbers cannot be")
        except FileNotFoundError:
            raise StoreError(
                f"{str(out)!r} lies there already, without the record of what made it, {path.name!r}. {INSTEAD}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"Cannot read the record {str(path)!r}: {error}. {INSTEAD}") from None
        return mark


@contextmanager
def _alone(out: Path) -> Generator[None]:
    """While no other run writes into the same file."""
    path = out.with_name(f".{out.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"Another run is writing into {str(out)!r}. Wait for it to end, or choose another file."
        ) from None
    except OSError as error:
        raise StoreError(f"Cannot write {str(out)!r}: {error.strerror}. Choose another place.") from None
    try:
        yield
    finally:
        with suppress(OSError):  # some systems do not remove a file that is open
            path.unlink()
        lock.release()


def _go_on(scoring: Scoring, source: Source, out: Path, key: str, *, fresh: bool) -> Counts:
    mark, whole, size = _nothing(key, scoring) if fresh else _taken_up(out, key) or _nothing(key, scoring)
    digest, lines, counts = hashlib.blake2b(digest_size=16), lines_of(source), Counts()
    _feed(digest, islice(lines, mark.start))
    held = list(islice(lines, mark.end - mark.start))
    _feed(digest, held)
    if digest.hexdigest() != (mark.digest or digest.hexdigest()):
        raise StaleStore(
            f"{str(out)!r} was made from other lines than the first {mark.end} of {scoring.name}. {INSTEAD}"
        )
    if whole < mark.end:  # the earlier run ended inside a window
        rows = scoring.rows(held, mark.start)[whole - mark.start :]
        size = _append(out, size, b"".join(line for line, _ in rows))
        counts.add(rows)
    at = mark.end
    for window in windows_of(lines, mark.window):
        rows = scoring.rows(window, at)
        _feed(digest, window)
        if not at:
            _append(out, 0, b"")  # what lay there is not what the record will speak of
        Mark(key, mark.window, at, at + len(window), digest.hexdigest()).save(out)
        size = _append(out, size, b"".join(line for line, _ in rows))
        at += len(window)
        counts.add(rows)
        scoring.on_window(counts)
    _append(out, size, b"")
    return counts


def _nothing(key: str, scoring: Scoring) -> tuple[Mark, int, int]:
    return Mark(key, scoring.window, 0, 0, ""), 0, 0


def _taken_up(out: Path, key: str) -> tuple[Mark, int, int] | None:
    """The record of an output, its whole lines and their bytes; None where there is nothing to go on from."""
    if not out.exists() or not out.stat().st_size:
        return None
    mark = Mark.load(out)
    if mark.key != key:
        raise StaleStore(f"{str(out)!r} was made by another guard, or by this one on other weights. {INSTEAD}")
    whole, size = _whole_lines(out)
    if not mark.start <= whole <= mark.end:
        raise StaleStore(
            f"{str(out)!r} has {whole} lines, and its record speaks of {mark.start} to {mark.end}: it was changed. "
            f"{INSTEAD}"
        )
    return mark, whole, size


def _whole_lines(path: Path) -> tuple[int, int]:
    """How many lines end in a newline, and how many bytes they are."""
    count = size = seen = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            count += chunk.count(b"\n")
            size = seen + chunk.rindex(b"\n") + 1 if b"\n" in chunk else size
            seen += len(chunk)
    return count, size


def _append(out: Path, size: int, data: bytes) -> int:
    """Cut the file to `size` bytes and write on from there; the new size."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("r+b" if out.exists() else "wb") as file:
            file.truncate(size)
            file.seek(size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"Cannot write {str(out)!r}: {error.strerror}. Choose another place.") from None
    return size + len(data)


def _feed(digest: "hashlib.blake2b", lines: Iterable[bytes]) -> None:
    for line in lines:
        digest.update(b"%d " % len(line) + line)
