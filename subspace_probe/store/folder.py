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

    The same capture (model, prompts, tokens, sites, positions, dtype, interventions) into the same folder is not
    computed again; if it was interrupted, only the shards that are missing are. Labels may change: they are not part
    of the rows.

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
            manifest = _taken_up(folder, wanted)
            # leftovers of a process that was killed while it wrote
            for partial in (*folder.glob(".shard-*.safetensors.*"), *folder.glob(f".{MANIFEST}.*")):
                partial.unlink(missing_ok=True)
            yield _Recording(folder, manifest)
        finally:
            with suppress(OSError):  # some systems do not remove a file that is open
                (folder / LOCK).unlink()
            lock.release()


@final
class _Recording:
    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.missing = set(manifest.rows(folder).missing())

    def has(self, index: int) -> bool:
        # a whole capture may have been made in other parts
        return not self.missing or self.manifest.shards[index] not in self.missing

    def write(self, index: int, part: Part, rows: Mapping[Site, Tensor]) -> None:
        write_shard(self.folder / self.manifest.shards[index].file, rows, key=self.manifest.key, start=part.start)

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
        made=plan.made,
    )


def _taken_up(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest to go on with, written where it is new. Shards that are there already are checked."""
    path = folder / MANIFEST
    known = Manifest.load(path) if path.exists() else wanted
    if known.key != wanted.key:
        names = {**known.asked, **wanted.asked} if known.asked else {}
        differing = [name for name in names if known.asked.get(name) != wanted.asked.get(name)]
        what = f"its {', '.join(differing)} differ" if differing else "it was not written by a capture"
        raise StaleStore(f"{str(folder)!r} holds other activations: {what}. Choose another folder, or delete this one.")
    rows = known.rows(folder)
    missing = rows.missing()
    if missing and (known.made != wanted.made or known.shards != wanted.shards):
        differing = [name for name in wanted.made if known.made.get(name) != wanted.made[name]]
        raise StaleStore(
            f"{str(folder)!r} holds a part of this capture, made with other {', '.join(differing) or 'batches'}; its "
            "rows would differ by rounding. Go on with the same, or delete the folder."
        )
    # a whole capture is a whole capture, however it was made; it is read lazily, so only headers are checked here
    for shard in known.shards:
        if shard not in missing:
            (rows.verify if missing else rows.check)(shard)
    manifest = replace(wanted, shards=known.shards, made=known.made)
    if not path.exists() or manifest != known:
        manifest.save(path)  # new, or with other labels, or another name for the same model
    return manifest
