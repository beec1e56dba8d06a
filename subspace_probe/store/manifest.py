"""What lies in a folder of activations: sites, shards, and the prompts and labels the rows belong to. Strict JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, final

import torch

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import StoreError, SubspaceProbeError
from subspace_probe.core.files import atomic
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where
from subspace_probe.store.shards import DiskRows, Shard

FORMAT = "subspace-probe/activations/1"
MANIFEST = "manifest.json"
_PLAIN = {field.name: field.default for field in fields(Prompt)}


@final
@dataclass(frozen=True)
class Stored:
    """One site in the shards. The dtype is for people: tensors carry their own."""

    site: Site
    width: int
    dtype: str


@final
@dataclass(frozen=True)
class Manifest:
    """What a folder holds; the fields of `Activations` in plain values.

    Args:
        key: of the capture; every shard carries it too.
        shards: the files in the order of their rows. Those that are not there yet have not been captured yet.
        prompt: which prompt each row is from.
        position: absolute position of each row's token.
        asked: what the rows depend on, by name; empty for rows that no capture wrote.
        made: how they were computed.
    """

    key: str
    sites: tuple[Stored, ...]
    shards: tuple[Shard, ...]
    where: Where
    contrast: Contrast
    prompt: tuple[int, ...]
    position: tuple[int, ...]
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    asked: Mapping[str, str] = field(default_factory=dict[str, str])
    made: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        bounds = [0, *(shard.stop for shard in self.shards)]
        if not self.sites or not self.shards:
            raise ValueError("no sites or no shards")
        if [shard.start for shard in self.shards] != bounds[:-1] or any(b < a for a, b in pairwise(bounds)):
            raise ValueError("the shards leave gaps or overlap")
        if any(Path(shard.file).name != shard.file for shard in self.shards):
            raise ValueError("a shard outside the folder")
        if not len(self.prompt) == len(self.position) == bounds[-1]:
            raise ValueError(
                f"{bounds[-1]} rows, but {len(self.prompt)} prompt and {len(self.position)} position entries"
            )
        if self.prompt and not 0 <= min(self.prompt) <= max(self.prompt) < len(self.contrast):
            raise ValueError(f"rows of prompts that are not among the {len(self.contrast)} listed")

    def save(self, path: Path) -> None:
        """Write it; whole or not at all."""
        contrast = self.contrast
        body = {
            "format": FORMAT,
            "key": self.key,
            "asked": dict(self.asked),
            "made": dict(self.made),
            "n": len(self.prompt),
            "where": str(self.where),
            "sites": [{"site": s.site.short, "width": s.width, "dtype": s.dtype} for s in self.sites],
            "shards": [asdict(shard) for shard in self.shards],
            "notes": dict(self.notes),
            "contrast": {
                "name": contrast.name,
                "prompts": [{k: v for k, v in asdict(prompt).items() if v != _PLAIN[k]} for prompt in contrast.prompts],
                "labels": contrast.labels,
                "pairs": contrast.pairs,
                "groups": contrast.groups,
                "factors": dict(contrast.factors),
            },
            "prompt": self.prompt,
            "position": self.position,
        }
        with atomic(path) as partial:
            partial.write_text(json.dumps(body, allow_nan=False), encoding="utf-8")

    def rows(self, folder: Path) -> DiskRows:
        """The rows in a folder."""
        return DiskRows(folder, {stored.site: stored.width for stored in self.sites}, self.shards, self.key)

    def open(self, folder: Path) -> Activations:
        """The activations in a folder; rows stay on disk until they are asked for.

        Raises:
            StoreError: shards that are not there, or do not hold what they should.
        """
        rows = self.rows(folder)
        if missing := rows.missing():
            raise StoreError(
                f"{len(missing)} of the {len(self.shards)} shards in {str(folder)!r} are missing, the first "
                f"{missing[0].file}: the capture was interrupted, or files were deleted. Run the same capture again; "
                "only what is missing is computed."
            )
        for shard in self.shards:
            rows.check(shard)
        return Activations(
            rows=rows,
            contrast=self.contrast,
            prompt=torch.tensor(self.prompt, dtype=torch.long),
            position=torch.tensor(self.position, dtype=torch.long),
            where=self.where,
            notes=dict(self.notes),
        )

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read what `save` wrote.

        Raises:
            StoreError: no such file, or not a manifest.
        """
        try:
            body: Any = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"No activations in {str(path.parent)!r}: it has no {path.name}. Use 'subspace-probe capture'."
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StoreError(f"{str(path)!r} is not a readable manifest: {error}. Capture again.") from None
        written = cast("dict[str, Any]", body).get("format") if isinstance(body, dict) else type(body).__name__
        if written != FORMAT:
            raise StoreError(f"{str(path)!r} is no manifest of activations: expected {FORMAT!r}, found {written!r}.")
        try:
            return cls._of(body)
        except (KeyError, TypeError, ValueError, AttributeError, SubspaceProbeError) as error:
            raise StoreError(f"{str(path)!r} is damaged: {type(error).__name__} {error}. Capture again.") from None

    @classmethod
    def _of(cls, body: dict[str, Any]) -> "Manifest":
        source: dict[str, Any] = body["contrast"]
        return cls(
            key=str(body["key"]),
            sites=tuple(Stored(Site.parse(s["site"]), int(s["width"]), str(s["dtype"])) for s in body["sites"]),
            shards=tuple(Shard(str(s["file"]), int(s["start"]), int(s["stop"])) for s in body["shards"]),
            where=Where.parse(body["where"]),
            contrast=Contrast(
                name=source["name"],
                prompts=tuple(Prompt(**p | {"messages": tuple(p.get("messages", ()))}) for p in source["prompts"]),
                labels=tuple(source["labels"]),
                pairs=tuple(source["pairs"]),
                groups=tuple(source["groups"]),
                factors={name: tuple(column) for name, column in source["factors"].items()},
            ),
            prompt=tuple(body["prompt"]),
            position=tuple(body["position"]),
            notes={str(name): str(value) for name, value in body["notes"].items()},
            asked={str(name): str(value) for name, value in body["asked"].items()},
            made={str(name): str(value) for name, value in body["made"].items()},
        )
