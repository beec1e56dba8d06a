"""Notes as plain JSON: what every reader of our files can read."""

import math
import numbers
from collections.abc import Mapping
from typing import Any, cast

from subspace_probe.core.errors import ConfigError


def plain(value: Any, name: str = "notes") -> Any:
    """The value with NumPy's numbers as Python's, tuples as lists, and None for nan and infinity, which JSON has not.

    Raises:
        ConfigError: something that is no JSON value, with its place.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(float(value)) else None
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(key): plain(item, f"{name}.{key}") for key, item in items}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(cast("list[Any]", value))]
    raise ConfigError(
        f"{name} holds a {type(value).__name__}, which no JSON file can hold. Keep numbers, texts, lists and "
        "dictionaries in notes."
    )
