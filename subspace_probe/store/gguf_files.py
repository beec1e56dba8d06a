"""GGUF files, as far as control vectors need them: a few numbers and texts, and tensors that are not quantised.

The reader believes nothing it has not the bytes for. A count in a GGUF file is 64 bits wide, so one damaged byte turns
an 80-byte file into one that claims millions of values; every count is held against what is left of the file first.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What is refused here is what llama.cpp's own reader
(`gguf_init_from_file`) refuses.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import StoreError
from subspace_probe.core.files import atomic

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
LONGEST_NAME = 63
MOST_DIMS = 4

UINT32, STRING, ARRAY = 4, 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value in the metadata: how it is packed."""


class Dtype(NamedTuple):
    """A type of tensor: what GGUF calls it, and what it is in torch."""

    name: str
    torch: torch.dtype


DTYPES = {
    0: Dtype("F32", torch.float32),
    1: Dtype("F16", torch.float16),
    28: Dtype("F64", torch.float64),
    30: Dtype("BF16", torch.bfloat16),
}

Value = int | float | str | list[int] | list[float] | list[str]


@final
@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: up to 63 bytes.
        shape: innermost dimension first, as the file has it.
        type: "F32", "F16", ...; "type 8" for one that is not known here.
        values: all its numbers in one row; None where they were not asked for, or are quantised.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    values: Float[Tensor, " n"] | None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def dims(self) -> int:
        """Number of dimensions as llama.cpp counts them: trailing ones do not count."""
        return max((i + 1 for i, n in enumerate(self.shape) if n > 1), default=1)


@final
@dataclass(frozen=True, eq=False)
class GgufFile:
    """What was read: metadata by key, and the tensors in their order."""

    metadata: dict[str, Value]
    tensors: tuple[GgufTensor, ...]


def read_gguf(path: Path, *, prefix: str = "") -> GgufFile:
    """Read the metadata, and the values of the tensors whose names begin with `prefix`.

    Raises:
        StoreError: no such file, not GGUF, or damaged; says where.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path).read(prefix)
    except FileNotFoundError:
        raise StoreError(f"No file {str(path)!r}. Give the path of a GGUF file.") from None
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{str(path)!r} cannot be read: {error.strerror}.") from None


@final
class _Reader:
    """Takes a file apart from front to back; knows what is left."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.left = file.seek(0, 2)
        file.seek(0)

    def read(self, prefix: str) -> GgufFile:
        if (magic := self.file.read(4)) != MAGIC:
            raise StoreError(f"{str(self.path)!r} is not a GGUF file: it begins with {magic!r}, not with {MAGIC!r}.")
        self.left -= 4
        (version,) = self.unpack("I", "its version")
        if version & 0xFFFF == 0:
            raise StoreError(
                f"{str(self.path)!r} is a big-endian GGUF file. Write it again on a little-endian machine."
            )
        if version not in (2, VERSION):
            raise StoreError(f"{str(self.path)!r} has GGUF version {version}; versions 2 and {VERSION} can be read.")
        n_tensors, n_values = self.unpack("QQ", "its counts")
        metadata: dict[str, Value] = {}
        for _ in range(n_values):
            key = self.text("a key")
            if not key or key in metadata:
                raise self.damaged(f"the key {key!r} is empty or stands there twice")
            metadata[key] = self.value(key)
        infos: dict[str, _Info] = {}
        for _ in range(n_tensors):
            info = self.info()
            if info.name in infos:
                raise self.damaged(f"the tensor {info.name!r} stands there twice")
            infos[info.name] = info
        return GgufFile(metadata, self.tensors(list(infos.values()), self.alignment(metadata), prefix))

    def tensors(self, infos: "list[_Info]", alignment: int, prefix: str) -> tuple[GgufTensor, ...]:
        """The tensors, one after another without gaps, as llama.cpp wants them."""
        if infos:
            self.take(-self.file.tell() % alignment, "the padding before its tensors")
        start, room = self.file.tell(), self.left
        end: int | None = 0  # unknown behind a quantised one, whose size is not known here
        found: list[GgufTensor] = []
        for name, shape, kind, offset in infos:
            if kind not in DTYPES:
                found.append(GgufTensor(name, shape, f"type {kind}", None))
                end = None
                continue
            dtype = DTYPES[kind]
            size = math.prod(shape) * dtype.torch.itemsize
            padded = size + -size % alignment
            if end not in (None, offset) or offset + padded > room:
                raise self.damaged(f"the tensor {name!r} does not lie where it should, or the file was cut short")
            end = None if end is None else end + padded
            wanted = name.startswith(prefix)
            values = self.values(start + offset, size, dtype.torch) if wanted else None
            found.append(GgufTensor(name, shape, dtype.name, values))
        return tuple(found)

    def values(self, offset: int, size: int, dtype: torch.dtype) -> Tensor:
        self.file.seek(offset)
        data = bytearray(self.file.read(size))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def info(self) -> "_Info":
        name = self.text("the name of a tensor")
        (dims,) = self.unpack("I", f"the shape of {name!r}")
        if len(name.encode()) > LONGEST_NAME or dims > MOST_DIMS:
            raise self.damaged(f"{name[:80]!r} with {dims} dimensions is no tensor")
        shape = tuple(self.unpack(f"{dims}q", f"the shape of {name!r}"))
        if min(shape, default=0) < 0:
            raise self.damaged(f"the tensor {name!r} has the shape {shape}")
        return _Info(name, shape, *self.unpack("IQ", f"the place of {name!r}"))

    def alignment(self, metadata: Mapping[str, Value]) -> int:
        found = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(found, int) or found <= 0 or found & (found - 1):
            raise self.damaged(f"general.alignment is {found!r}, not a power of two")
        return found

    def value(self, key: str) -> Value:
        (kind,) = self.unpack("I", f"the type of {key!r}")
        if kind != ARRAY:
            return self.values_of(kind, 1, key)[0]
        kind, count = self.unpack("IQ", f"the length of {key!r}")
        return self.values_of(kind, count, key)

    def values_of(self, kind: int, count: int, key: str) -> list[int] | list[float] | list[str]:
        if kind == STRING:
            return [self.text(f"the value of {key!r}") for _ in range(count)]
        if kind not in NUMBERS:
            raise self.damaged(f"the value of {key!r} is of type {kind}, which GGUF does not have there")
        self.require(count, f"the value of {key!r}")
        return list(self.unpack(f"{count}{NUMBERS[kind]}", f"the value of {key!r}"))

    def text(self, what: str) -> str:
        (length,) = self.unpack("Q", what)
        return self.take(length, what).decode("utf-8", errors="replace")

    def unpack(self, form: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        self.left -= count
        return self.file.read(count)

    def require(self, count: int, what: str) -> None:
        if count > self.left:
            raise self.damaged(f"{what} takes {count} bytes or more, and {self.left} are left")

    def damaged(self, why: str) -> StoreError:
        return StoreError(f"{str(self.path)!r} is a damaged GGUF file: {why}. Get it or write it again.")


class _Info(NamedTuple):
    """What the file says of a tensor before the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def write_gguf(path: Path, metadata: Mapping[str, int | str], tensors: Mapping[str, Float[Tensor, " n"]]) -> Path:
    """Write whole numbers as uint32, texts, and tensors as F32; the same bytes for the same content.

    Raises:
        StoreError: the place cannot be written.
    """
    head = [struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind = UINT32 if isinstance(value, int) else STRING
        packed = struct.pack("<I", value) if isinstance(value, int) else _text(value)
        head += [_text(key), struct.pack("<I", kind), packed]
    data: list[bytes] = []
    for name, tensor in tensors.items():
        head += [_text(name), struct.pack("<IqIQ", 1, len(tensor), 0, sum(map(len, data)))]
        data.append(_padded(tensor.detach().cpu().float().numpy().astype("<f4").tobytes()))
    with atomic(path) as partial:
        partial.write_bytes(_padded(b"".join(head)) + b"".join(data))
    return path


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", errors="replace")
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
