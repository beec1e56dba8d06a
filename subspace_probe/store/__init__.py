"""Activations on disk: a folder of safetensors shards and a `manifest.json` that says what is in them.

No code runs on load and rows are read as they are needed, so whatever takes `Activations` takes a folder larger than
memory just as well:

    acts = model.capture(contrast, into=Folder("acts"))
    direction = MeanDifference().fit(acts, Site(2))
"""

from pathlib import Path

from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.files import atomic_folder
from subspace_probe.core.keys import content_key
from subspace_probe.core.sites import Site
from subspace_probe.store.folder import Folder
from subspace_probe.store.manifest import MANIFEST, Manifest, Stored
from subspace_probe.store.shards import DiskRows, Shard, shard_name, write_shard

__all__ = ["DiskRows", "Folder", "open_activations", "save_activations"]

SHARD_BYTES = 64 * 2**20


def save_activations(acts: Activations, folder: str | Path) -> Path:
    """Write activations with their prompts and labels; whole or not at all.

    The numbers are kept exactly, in the dtype they have.

    Returns:
        The folder.

    Raises:
        StoreError: the place cannot be written.
    """
    folder = Path(folder)
    some = {site: acts.rows.read(site, 0, 1) for site in acts.sites}
    row_bytes = sum(rows.shape[1] * rows.element_size() for rows in some.values())
    step = max(1, SHARD_BYTES // max(1, row_bytes))
    starts = range(0, max(1, acts.rows.n), step)
    shards = tuple(Shard(shard_name(i), at, min(at + step, acts.rows.n)) for i, at in enumerate(starts))

    def rows(shard: Shard) -> dict[Site, Tensor]:
        return {site: acts.rows.read(site, shard.start, shard.stop) for site in acts.sites}

    contents = [content_key(rows(shard)) for shard in shards]
    key = content_key([acts.notes, acts.contrast, acts.where, acts.prompt, acts.position, contents])
    with atomic_folder(folder) as partial:
        for shard in shards:
            write_shard(partial / shard.file, rows(shard), key=key, start=shard.start)
        Manifest(
            key=key,
            sites=tuple(Stored(site, x.shape[1], str(x.dtype).removeprefix("torch.")) for site, x in some.items()),
            shards=shards,
            where=acts.where,
            contrast=acts.contrast,
            prompt=tuple(acts.prompt.tolist()),
            position=tuple(acts.position.tolist()),
            notes=acts.notes,
        ).save(partial / MANIFEST)
    return folder


def open_activations(folder: str | Path) -> Activations:
    """Activations that a capture or `save_activations` wrote; rows stay on disk until they are asked for.

    Raises:
        StoreError: no such folder, no manifest, another format, a capture that was interrupted, or shards that do not
            hold what the manifest says.
    """
    folder = Path(folder)
    return Manifest.load(folder / MANIFEST).open(folder)
