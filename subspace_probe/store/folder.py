"""A folder that a capture is recorded into, taken up again where it was interrupted, and never computed twice."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from filelock import FileLock, Timeout
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.captures import Part, Plan, Recording
from subspace_probe.core.errors import StaleStore, StoreError
from subspace_probe.core.sites import Site
from subspace_probe.store.manifest import MANIFEST, Manifest, Stored
from subspace_probe.store.shards import Shard, shard_name, write_shard

LOCK = ".lock"


@final
@dataclass(frozen=True)
class Folder:
    """Rows on disk: `model.capture(..., into=Folder("acts"))`.

    The same capture (model, prompts, sites, positions, dtype, interventions) into the same folder is not computed
    again; if it was interrupted, it goes on behind the last whole shard. Labels may change: they are not part of rows.

    Args:
        path: the folder; made if it is missing.
    """

    path: str | Path

    @contextmanager
    def record(self, plan: Plan) -> Generator[Recording]:
        """A recording of this capture, behind what the folder has of it.

        Raises:
            StaleStore: the folder holds another capture; says what differs.
            StoreError: the place cannot be written, another process records there, or a shard is damaged.
        """
        folder, wanted = Path(self.path), _manifest(plan)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK, timeout=0)
            lock.acquire()
        except Timeout:
            raise StoreError(f"Another capture is being recorded in {str(folder)!r}. Wait for it to end.") from None
        except OSError as error:
            raise StoreError(f"Cannot write into {str(folder)!r}: {error.strerror}. Choose another folder.") from None
        try:
            manifest, done = _taken_up(folder, wanted)
            # leftovers of a process that was killed while it wrote
            for partial in (*folder.glob(".shard-*.safetensors.*"), *folder.glob(f".{MANIFEST}.*")):
                partial.unlink(missing_ok=True)
            yield _Recording(folder, manifest, len(plan.parts) if done == len(manifest.shards) else done)
        finally:
            with suppress(OSError):  # some systems do not remove a file that is open
                (folder / LOCK).unlink()
            lock.release()


@final
@dataclass(eq=False)
class _Recording:
    folder: Path
    manifest: Manifest
    done: int

    def write(self, part: Part, rows: Mapping[Site, Tensor]) -> None:
        shard = self.manifest.shards[self.done]
        write_shard(self.folder / shard.file, rows, key=self.manifest.key, start=part.start)
        self.done += 1

    def finish(self) -> Activations:
        return self.manifest.open(self.folder)


def _manifest(plan: Plan) -> Manifest:
    dtype = str(plan.dtype).removeprefix("torch.")
    return Manifest(
        key=plan.key,
        asked=plan.asked,
        sites=tuple(Stored(site, width, dtype) for site, width in plan.widths.items()),
        shards=tuple(Shard(shard_name(i), part.start, part.stop) for i, part in enumerate(plan.parts)),
        where=plan.where,
        contrast=plan.contrast,
        prompt=tuple(plan.prompt.tolist()),
        position=tuple(plan.position.tolist()),
        notes=plan.notes,
    )


def _taken_up(folder: Path, wanted: Manifest) -> tuple[Manifest, int]:
    """The manifest to go on with, written where it is new, and how many of its shards are there."""
    path = folder / MANIFEST
    if not path.exists():
        wanted.save(path)
        return wanted, _verified(folder, wanted)
    known = Manifest.load(path)
    if known.key != wanted.key:
        names = {**known.asked, **wanted.asked} if known.asked else {}
        differing = [name for name in names if known.asked.get(name) != wanted.asked.get(name)]
        what = f"its {', '.join(differing)} differ" if differing else "it was not written by a capture"
        raise StaleStore(f"{str(folder)!r} holds other activations: {what}. Choose another folder, or delete this one.")
    # whatever parts it was computed in, a whole capture is a whole capture
    whole = not known.rows(folder).missing()
    if not whole and known.shards != wanted.shards:
        raise StaleStore(
            f"{str(folder)!r} holds a part of this capture, made with batches of other sizes. Use the same "
            "batch_tokens, or delete the folder."
        )
    manifest = replace(wanted, shards=known.shards)
    if manifest != known:
        manifest.save(path)  # other labels, or another name for the same model
    if whole:
        for shard in manifest.shards:
            manifest.rows(folder).check(shard)
        return manifest, len(manifest.shards)
    return manifest, _verified(folder, manifest)


def _verified(folder: Path, manifest: Manifest) -> int:
    """How many of the first shards are there; each is checked, since the capture builds on it."""
    rows = manifest.rows(folder)
    missing = set(rows.missing())
    for index, shard in enumerate(manifest.shards):
        if shard in missing:
            return index
        rows.verify(shard)
    return len(manifest.shards)
