"""Interventions as JSON and back: whatever they are made of, exactly, and no code.

Tensors are kept as the base64 of their little-endian bytes, so that what comes back is what was written, bit by bit.
"""

import base64
import binascii
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from jaxtyping import jaxtyped
from torch import Tensor

from subspace_probe.core.errors import ConfigError, StoreError, SubspaceProbeError, unknown
from subspace_probe.core.files import atomic
from subspace_probe.core.protocols import Intervention
from subspace_probe.core.sites import Everywhere, Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.interventions import INTERVENTIONS, PARTS

FORMAT: Final = "subspace-probe/interventions/1"
_DTYPES: Final = {str(dtype)[6:]: dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool,
)}  # fmt: skip


def to_json(*interventions: Intervention) -> str:
    """Interventions as one JSON text.

    Raises:
        ConfigError: one that is not in `INTERVENTIONS`, or holds what no JSON can hold, such as a function.
    """
    if sys.byteorder != "little":
        raise ConfigError("Tensors are written little-endian, and this machine is not.")
    made = [_encoded(intervention, f"interventions[{i}]") for i, intervention in enumerate(interventions)]
    return json.dumps({"format": FORMAT, "interventions": made}, allow_nan=False)


def from_json(text: str) -> tuple[Intervention, ...]:
    """The interventions that `to_json` wrote.

    Raises:
        StoreError: no such text, or one that was changed so that it makes no sense.
        UnknownName: a kind that this version does not know.
    """
    try:
        read: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"This is no JSON: {error}. Give what to_json wrote.") from None
    if not isinstance(read, dict) or cast("dict[str, Any]", read).get("format") != FORMAT:
        raise StoreError(f"This is not of the format {FORMAT!r}. Give what to_json wrote.")
    items: Any = cast("dict[str, Any]", read).get("interventions")
    if not isinstance(items, list):
        raise StoreError("There is no list of interventions in this text. Give what to_json wrote.")
    found = [_decoded(item, f"interventions[{i}]") for i, item in enumerate(cast("list[Any]", items))]
    for i, item in enumerate(found):
        if type(item) not in _interventions().values():
            raise StoreError(f"interventions[{i}] is a {type(item).__name__}, which is no intervention.")
    return tuple(found)


def save_interventions(path: str | Path, *interventions: Intervention) -> Path:
    """Write them to a file; whole or not at all."""
    text = to_json(*interventions)
    with atomic(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def load_interventions(path: str | Path) -> tuple[Intervention, ...]:
    """Read them from a file.

    Raises:
        StoreError: no such file, or not one of these.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be read: {error}. Name a file that save_interventions wrote.") from None
    return from_json(text)


@cache
def _interventions() -> Mapping[str, type]:
    return {name: INTERVENTIONS.load(name) for name in INTERVENTIONS}


@cache
def _kinds() -> Mapping[str, type]:
    """Name to class: interventions by their name in the table, their parts by the class's own."""
    core = {kind.__name__: kind for kind in (Site, Everywhere, Where, Subspace)}
    return {**_interventions(), **core, **{name: PARTS.load(name) for name in PARTS}}


def _encoded(value: Any, place: str) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{place} is {value}, which no JSON can hold. Give a finite number.")
        return value
    if isinstance(value, Tensor):
        return _tensor(value, place)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = {kind: name for name, kind in _kinds().items()}
        if type(value) not in names:
            raise ConfigError(
                f"{place} is a {type(value).__name__}, which is not in the table of interventions or of their parts. "
                "Add it there, as subspace_probe.interventions.INTERVENTIONS says."
            )
        fields = {f.name: _encoded(getattr(value, f.name), f"{place}.{f.name}") for f in dataclasses.fields(value)}
        return {"kind": names[type(value)], **fields}
    if isinstance(value, Mapping):
        items = list(cast("Mapping[Any, Any]", value).items())
        return {"mapping": [[_encoded(k, place), _encoded(v, f"{place}[{k}]")] for k, v in items]}
    if isinstance(value, list | tuple):
        rows = [_encoded(item, f"{place}[{i}]") for i, item in enumerate(cast("Sequence[Any]", value))]
        return rows if isinstance(value, list) else {"tuple": rows}
    raise ConfigError(f"{place} is a {type(value).__name__}, which no JSON can hold. Use plain values and tensors.")


def _tensor(value: Tensor, place: str) -> dict[str, Any]:
    name = str(value.dtype)[6:]
    if name not in _DTYPES:
        raise ConfigError(f"{place} is of dtype {name}, which is not kept. Use one of {', '.join(_DTYPES)}.")
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {"tensor": name, "shape": list(value.shape), "base64": base64.b64encode(data).decode()}


def _decoded(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_decoded(item, f"{place}[{i}]") for i, item in enumerate(cast("list[Any]", value))]
    if not isinstance(value, dict):
        return value
    fields = cast("dict[str, Any]", value)
    try:
        if "tensor" in fields:
            return _read_tensor(fields)
        if "mapping" in fields:
            return {_decoded(k, place): _decoded(v, f"{place}[{k}]") for k, v in fields["mapping"]}
        if "tuple" in fields:
            return tuple(_decoded(item, f"{place}[{i}]") for i, item in enumerate(fields["tuple"]))
        if fields.get("kind") not in _kinds():
            raise unknown("kind", str(fields.get("kind")), _kinds())
        kind = _kinds()[fields["kind"]]
        given = {name: _decoded(item, f"{place}.{name}") for name, item in fields.items() if name != "kind"}
        for name, hint in get_type_hints(kind).items():
            if name in given and not _fits(given[name], hint):
                raise StoreError(f"{place}.{name} is {given[name]!r}, which is not what a {kind.__name__} holds there.")
        return kind(**given)
    except SubspaceProbeError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise StoreError(f"{place} cannot be read: {error}. Give what to_json wrote.") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a field's annotation says, as far as it goes; JSON can hold anything anywhere."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in args)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in args)
    if hint in (float, int):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if origin is tuple or hint is tuple:
        return isinstance(value, tuple) and (Ellipsis not in args or all(_fits(item, args[0]) for item in value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = cast("Mapping[Any, Any]", value).items() if isinstance(value, Mapping) else [(None, None)]
        return all(_fits(key, args[0]) and _fits(item, args[1]) for key, item in items)
    if isinstance(origin, type):  # sequences
        listed = isinstance(value, list | tuple)
        return listed and all(_fits(item, args[0]) for item in cast("Sequence[Any]", value))
    with jaxtyped("context"):  # sizes of one field say nothing about the next one's
        return isinstance(value, hint) if isinstance(hint, type) else True


def _read_tensor(fields: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES.get(fields["tensor"]), [int(size) for size in fields["shape"]]
    try:
        data = base64.b64decode(fields["base64"], validate=True)
    except binascii.Error as error:
        raise StoreError(f"A tensor's bytes cannot be read: {error}. Give what to_json wrote.") from None
    if dtype is None or min(shape, default=1) < 0 or len(data) != math.prod(shape) * dtype.itemsize:
        raise StoreError(
            f"A tensor of dtype {fields['tensor']} and shape {shape} does not have {len(data)} bytes: it was changed."
        )
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)
