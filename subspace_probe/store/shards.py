"""Safetensors shards: one tensor per site, `L12.resid_post` of shape [rows, width], read a slice at a time.

A shard says in its header which capture it belongs to and what its bytes hash to, so a file of another capture, a cut
one and one with a flipped bit are all told from a good one. https://huggingface.co/docs/safetensors
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from subspace_probe.core.errors import StoreError
from subspace_probe.core.files import atomic
from subspace_probe.core.sites import Site

HEADER = "subspace_probe"
"""One entry with everything in it: the order of several is not fixed, and a capture's bytes are."""


@final
@dataclass(frozen=True)
class Shard:
    """One file: rows `start` to `stop` of every site."""

    file: str
    start: int
    stop: int


def shard_name(index: int) -> str:
    """The file name of the i-th shard."""
    return f"shard-{index:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[Site, Tensor], *, key: str, start: int) -> None:
    """Write one shard, in the tensors' own dtype; whole or not at all.

    Args:
        key: of the capture.
        start: its first row.

    Raises:
        StoreError: the file cannot be written.
    """
    rows = {site.short: tensor.detach().cpu().contiguous() for site, tensor in tensors.items()}
    header = {"key": key, "start": start, "digests": {name: _digest(tensor) for name, tensor in rows.items()}}
    try:
        with atomic(path) as partial:
            save_file(rows, partial, metadata={HEADER: json.dumps(header, sort_keys=True)})
    except (SafetensorError, OSError) as error:
        raise StoreError(f"Cannot write {str(path)!r}: {error}. Choose a place with more room.") from None


@final
@dataclass(frozen=True, eq=False)
class DiskRows:
    """Rows in a folder of shards. Files are opened for each read, so threads and processes may share one.

    Args:
        folder: where the shards lie.
        widths: what was captured, with its width, in forward order.
        shards: the files, in the order of their rows, without gaps.
        key: of the capture they belong to.
    """

    folder: Path
    widths: Mapping[Site, int]
    shards: Sequence[Shard]
    key: str
    _sound: set[tuple[str, Site]] = field(default_factory=set[tuple[str, Site]])

    @property
    def sites(self) -> tuple[Site, ...]:
        """What was captured, in forward order."""
        return tuple(self.widths)

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.shards[-1].stop

    def width(self, site: Site) -> int:
        """Width of a site."""
        return self.widths[site]

    def read(self, site: Site, start: int, stop: int) -> Float[Tensor, "rows width"]:
        """Some rows of a site; only their shards are read, and checked when they are first touched.

        Raises:
            StoreError: a shard has gone or is damaged.
        """
        stop = min(stop, self.n)
        wanted = [shard for shard in self.shards if shard.start < stop and start < shard.stop] or self.shards[:1]
        parts: list[Tensor] = []
        for shard in wanted:
            first, last = max(start - shard.start, 0), min(stop, shard.stop) - shard.start
            with ExitStack() as stack:
                rows = self._slice(shard, site, stack)
                parts.append(rows[first : max(first, last)] if rows.get_shape()[0] else rows[:])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def missing(self) -> list[Shard]:
        """Shards that are not there."""
        return [shard for shard in self.shards if not (self.folder / shard.file).is_file()]

    def check(self, shard: Shard) -> None:
        """Compare a shard's header with what it should hold; the rows themselves are not read.

        Raises:
            StoreError: it is missing, unreadable, of another capture, or holds other rows.
        """
        for site in self.widths:
            with ExitStack() as stack:
                self._header(shard, site, stack)

    def verify(self, shard: Shard) -> None:
        """Compare a shard's rows with the hash in its header.

        Raises:
            StoreError: they are damaged, or what `check` raises.
        """
        for site in self.widths:
            with ExitStack() as stack:
                self._slice(shard, site, stack)

    def _slice(self, shard: Shard, site: Site, stack: ExitStack) -> Any:
        rows, digest = self._header(shard, site, stack)
        if (shard.file, site) not in self._sound:
            if _digest(rows[:]) != digest:
                raise StoreError(
                    f"{self._path(shard)} is damaged: its rows at {site.short} are not those that were written. "
                    "Delete this file and run the same capture again; only its rows are computed."
                )
            self._sound.add((shard.file, site))
        return rows

    def _header(self, shard: Shard, site: Site, stack: ExitStack) -> tuple[Any, str]:
        try:
            file: Any = stack.enter_context(safe_open(self.folder / shard.file, framework="pt"))
            header: Any = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            key, digest = str(header["key"]), str(header["digests"][site.short])
            rows = file.get_slice(site.short)
            found = int(header["start"]), *(int(size) for size in rows.get_shape())
        except FileNotFoundError:
            raise StoreError(
                f"No file {self._path(shard)}, which the manifest beside it names. Run the same capture again."
            ) from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._path(shard)} is damaged, cut short or not a shard of its manifest: {error}. Delete this file "
                "and run the same capture again; only its rows are computed."
            ) from None
        if key != self.key:
            raise StoreError(
                f"{self._path(shard)} belongs to another capture ({key[:8]}, not {self.key[:8]}). Put the right file "
                "back, or delete this one and run the same capture again."
            )
        if found != (wanted := (shard.start, shard.stop - shard.start, self.widths[site])):
            raise StoreError(
                f"{self._path(shard)} holds {site.short} from row {found[0]} on, of shape {found[1:]}; its manifest "
                f"says from row {wanted[0]} on, of shape {wanted[1:]}. Delete this file and run the same capture again."
            )
        return rows, digest

    def _path(self, shard: Shard) -> str:
        return repr(str(self.folder / shard.file))


def _digest(rows: Tensor) -> str:
    import xxhash  # as fast as memory, so rows are checked whenever they are first read

    return xxhash.xxh3_128_hexdigest(rows.contiguous().flatten().view(torch.uint8).numpy().data)
