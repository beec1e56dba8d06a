"""Activations on disk: a folder of safetensors shards and a `manifest.json` that says what is in them.

No code runs on load and rows are read as they are needed, so whatever takes `Activations` takes a folder larger than
memory just as well:

    acts = open_activations(save_activations(model.capture(contrast), "acts"))
    direction = MeanDifference().fit(acts, Site(2))

A first version: one shard, written at once.
"""

from pathlib import Path

import torch

from subspace_probe.core.activations import Activations
from subspace_probe.core.files import atomic_folder
from subspace_probe.store.manifest import MANIFEST, Manifest, Stored
from subspace_probe.store.shards import DiskRows, Shard, shard_name, write_shard

__all__ = ["DiskRows", "open_activations", "save_activations"]


def save_activations(acts: Activations, folder: str | Path) -> Path:
    """Write activations with their prompts and labels; whole or not at all.

    The numbers are kept exactly, in the dtype they have.

    Returns:
        The folder.

    Raises:
        StoreError: the place cannot be written.
    """
    folder = Path(folder)
    shard = Shard(shard_name(0), 0, acts.rows.n)
    with atomic_folder(folder) as partial:
        tensors = {site: acts.at(site) for site in acts.sites}
        write_shard(partial / shard.file, tensors)
        stored = tuple(Stored(site, x.shape[1], str(x.dtype).removeprefix("torch.")) for site, x in tensors.items())
        manifest = Manifest(
            sites=stored,
            shards=(shard,),
            where=acts.where,
            contrast=acts.contrast,
            prompt=tuple(acts.prompt.tolist()),
            position=tuple(acts.position.tolist()),
            notes=acts.notes,
        )
        manifest.save(partial / MANIFEST)
    return folder


def open_activations(folder: str | Path) -> Activations:
    """Activations that `save_activations` wrote; rows stay on disk until they are asked for.

    Raises:
        StoreError: no such folder, no manifest, another format, or shards that do not hold what the manifest says.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder / MANIFEST)
    rows = DiskRows(folder, {stored.site: stored.width for stored in manifest.sites}, manifest.shards)
    rows.check()
    return Activations(
        rows=rows,
        contrast=manifest.contrast,
        prompt=torch.tensor(manifest.prompt, dtype=torch.long),
        position=torch.tensor(manifest.position, dtype=torch.long),
        where=manifest.where,
        notes=dict(manifest.notes),
    )
