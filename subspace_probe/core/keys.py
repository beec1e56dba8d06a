"""Content keys: equal for equal contents, in any process and on any machine."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence, Set
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor

from subspace_probe.core.errors import ConfigError


def content_key(value: Any) -> str:
    """A hash of plain values, tensors and dataclasses of them, 32 hexadecimal digits.

    Raises:
        ConfigError: something whose contents cannot be seen, such as a function.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, value)
    return digest.hexdigest()


@cache
def _kept(kind: type) -> tuple[str, tuple[str, ...], frozenset[str]]:
    """Of a dataclass: its full name, the names of its fields, and those of its cached properties."""
    cached = {name for base in kind.__mro__ for name, item in vars(base).items() if isinstance(item, cached_property)}
    names = tuple(field.name for field in dataclasses.fields(kind))
    return f"{kind.__module__}.{kind.__qualname__}", names, frozenset(cached)


def _feed(digest: Any, value: Any) -> None:
    # every value is preceded by its kind and size, so that no two different values give the same stream of bytes
    if isinstance(value, str | bytes):  # first, since most values are
        data = value.encode() if isinstance(value, str) else value
        digest.update(f"{type(value).__name__} {len(data)} ".encode() + data)
    elif value is None or isinstance(value, bool | int | float | complex | torch.dtype | torch.device):
        digest.update(f"{type(value).__name__} {value!r} ".encode())
    elif isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind, names, cached = _kept(type(value))
        if hidden := sorted({*getattr(value, "__dict__", ())} - {*names} - cached):
            raise ConfigError(
                f"A {type(value).__name__} has no content key: it keeps {', '.join(hidden)} outside its fields. "
                "Make them fields, or capture into memory."
            )
        _feed(digest, (kind, {name: getattr(value, name) for name in names}))
    elif isinstance(value, Mapping):
        items = sorted(cast("Mapping[Any, Any]", value).items(), key=lambda item: str(item[0]))
        digest.update(f"mapping {len(items)} ".encode())
        for pair in items:
            _feed(digest, pair)
    elif isinstance(value, Set):
        _feed(digest, sorted(content_key(item) for item in cast("Set[Any]", value)))
    elif isinstance(value, Sequence):
        digest.update(f"sequence {len(cast('Sequence[Any]', value))} ".encode())
        for item in cast("Sequence[Any]", value):
            _feed(digest, item)
    else:
        raise ConfigError(
            f"A {type(value).__name__} has no content key, because what it does cannot be read from it. Use an "
            "intervention that is a dataclass of plain values and tensors, or capture into memory."
        )
