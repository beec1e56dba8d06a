"""Content keys: equal for equal contents, in any process and on any machine."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
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


def _is_cache(item: object) -> bool:
    return isinstance(item, cached_property)


def _feed(digest: Any, value: Any) -> None:
    # every value is preceded by its kind and size, so that no two different values give the same stream of bytes
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        cached = {name for kind in type(value).__mro__ for name, item in vars(kind).items() if _is_cache(item)}
        if hidden := sorted({*getattr(value, "__dict__", ())} - {*fields} - cached):
            raise ConfigError(
                f"A {type(value).__name__} has no content key: it keeps {', '.join(hidden)} outside its fields. "
                "Make them fields, or capture into memory."
            )
        _feed(digest, (f"{type(value).__module__}.{type(value).__qualname__}", fields))
    elif isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        digest.update(f"{type(value).__name__} {len(data)} ".encode() + data)
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
    elif value is None or isinstance(value, bool | int | float | complex | torch.dtype | torch.device):
        digest.update(f"{type(value).__name__} {value!r} ".encode())
    else:
        raise ConfigError(
            f"A {type(value).__name__} has no content key, because what it does cannot be read from it. Use an "
            "intervention that is a dataclass of plain values and tensors, or capture into memory."
        )
