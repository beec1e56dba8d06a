"""Safetensors shards: one tensor per site, `L12.resid_post` of shape [rows, width], read a slice at a time.

The files hold nothing else; whose rows they are stands in the manifest. https://huggingface.co/docs/safetensors
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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


def write_shard(path: Path, tensors: Mapping[Site, Tensor]) -> None:
    """Write one shard, in the tensors' own dtype; whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    try:
        with atomic(path) as partial:
            save_file({site.short: rows.detach().cpu().contiguous() for site, rows in tensors.items()}, partial)
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
    """

    folder: Path
    widths: Mapping[Site, int]
    shards: Sequence[Shard]

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
        """Some rows of a site; only these are read from disk.

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

    def check(self) -> None:
        """Compare the shards' headers with what they should hold.

        Raises:
            StoreError: a shard is missing, unreadable, or holds other rows.
        """
        for shard in self.shards:
            for site, width in self.widths.items():
                with ExitStack() as stack:
                    found = tuple(self._slice(shard, site, stack).get_shape())
                if found != (shard.stop - shard.start, width):
                    raise StoreError(
                        f"{str(self.folder / shard.file)!r} holds {site.short} of shape {found}, but its manifest says "
                        f"{(shard.stop - shard.start, width)}. They are of different captures; capture again."
                    )

    def _slice(self, shard: Shard, site: Site, stack: ExitStack) -> Any:
        path = self.folder / shard.file
        try:
            return stack.enter_context(safe_open(path, framework="pt")).get_slice(site.short)
        except FileNotFoundError:
            raise StoreError(f"No file {str(path)!r}, which the manifest beside it names. Capture again.") from None
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"{str(path)!r} is damaged or not a shard of its manifest: {error}. Capture again."
            ) from None
