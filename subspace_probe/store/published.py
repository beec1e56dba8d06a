"""Directions that others published as tensors: `.pt` files without code in them, and safetensors.

Nothing is run: a pickle is read with torch's `weights_only`. A tensor may be a view whose file holds far more than it
shows (a published direction that drags all its rivals along), or lie on a GPU; what is kept is its own numbers.
"""

import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from subspace_probe.core.errors import ConfigError, ShapeError, StoreError
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where, at
from subspace_probe.linalg.finite import all_finite

METADATA = "direction_metadata.json"
NOISE = 1e-9
"""Rows this much shorter than the longest of their file are rounding noise: the difference of equal embeddings."""

_RESAVE = """Where you trust it, write it again, and import that:
    tensor = torch.as_tensor(torch.load({path!r}, weights_only=False))
    safetensors.torch.save_file({{"direction": tensor.contiguous()}}, "direction.safetensors")"""


# What torch.load was seen to raise on damaged files, or says that it raises.
_UNREADABLE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, struct.error, tarfile.TarError,
)  # fmt: skip


class _Place(NamedTuple):
    """Where a direction comes from, as far as it is known."""

    position: int | None
    layer: int | None


def import_direction(
    path: str | Path,
    *,
    layer: int | None = None,
    position: int | None = None,
    site: Site | None = None,
    where: Where | None = None,
    model: str | None = None,
) -> Subspace:
    """Read a published direction; its length becomes the scale, its origin is zero.

    By the tensor's shape:

    * [d]: a direction, as Arditi et al. (2024) publish in `direction.pt`.
    * [positions, layers, d]: candidates, as in their `mean_diffs.pt`; positions count from the end of the prompt
      (-1 is its last token), and row `layer` is the input of that block, `resid_pre`. Choose `position` and `layer`.
    * [layers, d] or [layers + 1, d]: a direction for each layer in the order of Hugging Face's hidden states, as Zhao
      et al. (2025) publish: row 0 are the embeddings, row L is what block L - 1 hands on and block L receives. The site
      is `resid_post` of block L - 1, which is there for the last row as well. Choose `layer`.

    A `direction_metadata.json` beside the file, {"pos": ..., "layer": ...}, fills in what is not given.

    Args:
        path: a `.pt` or `.safetensors` file with one real tensor.
        layer: the row, and of a single direction the block whose input it was read from.
        position: the token it was read at, negative, from the end of the prompt.
        site: where it belongs, if not as above.
        where: the tokens it was read at, if not `at(position)`.
        model: name of the model, for the notes.

    Returns:
        A direction; its basis is float32, the notes keep dtype and length as they were.

    Raises:
        StoreError: no such file, damaged, a pickle that needs code, or no tensor that can be a direction.
        ConfigError: a layer or position that is needed and not given, or not there.
    """
    path = Path(path)
    tensor = _tensor(path)
    known = _metadata(path)
    place = _Place(known.position if position is None else position, known.layer if layer is None else layer)
    vector = _chosen(tensor, place, path)
    site = site or _site(tensor.dim(), place)
    tokens = where or (None if place.position is None else at(place.position))
    notes: dict[str, Any] = {
        "finder": "imported",
        "file": path.name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "norm": float(vector.double().square().sum().sqrt()),
    }
    notes |= {} if model is None else {"model": model}
    try:
        return Subspace.span(vector.double(), site=site, where=tokens, notes=notes)
    except ShapeError:
        raise StoreError(f"The direction in {str(path)!r} has the length {notes['norm']:g}, which is none.") from None


def _tensor(path: Path) -> Tensor:
    """The one tensor of a file, on the CPU, with real and finite numbers."""
    if not path.is_file():
        raise StoreError(f"No file {str(path)!r}. Give a .pt or .safetensors file with a tensor.")
    with path.open("rb") as file:
        start = file.read(9)
    loaded = _from_safetensors(path) if start[8:] == b"{" else _from_pickle(path)
    if not isinstance(loaded, Tensor):
        keys = f" with {', '.join(map(repr, list(loaded)[:5]))}" if isinstance(loaded, dict) else ""
        raise StoreError(f"{str(path)!r} holds a {type(loaded).__name__}{keys}, not a tensor. Save the tensor alone.")
    if loaded.layout != torch.strided or loaded.is_quantized or loaded.is_meta or not loaded.is_floating_point():
        kind = f"{loaded.layout}, {loaded.dtype}".replace("torch.", "")
        raise StoreError(f"The tensor in {str(path)!r} ({kind}) is not of real numbers. Save it as float32.")
    loaded = loaded.detach()
    if loaded.dim() not in (1, 2, 3) or not loaded.numel():
        raise StoreError(
            f"The tensor in {str(path)!r} has the shape {list(loaded.shape)}; [d], [layers, d] or [positions, layers, "
            "d] was expected. Save the part you mean."
        )
    return loaded


def _from_pickle(path: Path) -> object:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise StoreError(
                f"{str(path)!r} is a pickle that runs code when it is read (numpy arrays are), which is refused. "
                + _RESAVE.format(path=str(path))
            ) from None
        reason = str(error)
    except _UNREADABLE as error:
        reason = str(error)
    reason = " ".join(reason.split())[:200]
    raise StoreError(
        f"{str(path)!r} is not a readable .pt file, or damaged: {reason or 'it ends too early'}."
    ) from None


def _from_safetensors(path: Path) -> object:
    opened: Any = safe_open  # untyped in safetensors
    try:
        with opened(path, framework="pt") as file:
            names: list[str] = list(file.keys())
            if {"basis", "scale", "origin"} <= set(names):
                raise StoreError(f"{str(path)!r} is a subspace of this package already. Use Subspace.load.")
            return file.get_tensor(names[0]) if len(names) == 1 else dict.fromkeys(names)
    except (SafetensorError, OSError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{str(path)!r} is not a readable safetensors file: {error}") from None


def _metadata(path: Path) -> _Place:
    """What the file beside it says."""
    beside = path.with_name(METADATA)
    if not beside.is_file():
        return _Place(None, None)
    try:
        kept = json.loads(beside.read_text(encoding="utf-8"))
        position, layer = kept["pos"], kept["layer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f'{str(beside)!r} is not {{"pos": -2, "layer": 10}}: {error}. Mend or remove it.') from None
    if type(position) is not int or type(layer) is not int or layer < 0:
        raise StoreError(
            f"{str(beside)!r} has pos {position!r} and layer {layer!r}, not whole numbers. Mend or remove it."
        )
    return _Place(position, layer)


def _chosen(tensor: Tensor, place: _Place, path: Path) -> Tensor:
    """The direction that is meant. A view: `Subspace.span` computes a tensor of its own from it."""
    vector, lengths = tensor, None
    if tensor.dim() > 1:
        shape = list(tensor.shape)
        if place.layer is None or not 0 <= place.layer < shape[-2]:
            raise ConfigError(
                f"{str(path)!r} has the shape {shape}: give layer, 0 to {shape[-2] - 1}, not {place.layer}."
            )
        vector = tensor[..., place.layer, :]
        if tensor.dim() == 3:
            if place.position is None or not -shape[0] <= place.position < 0:
                raise ConfigError(
                    f"{str(path)!r} has the shape {shape}: give position, -{shape[0]} to -1, counted from the end of "
                    f"the prompt, not {place.position}."
                )
            vector = vector[place.position]
        lengths = tensor.double().norm(dim=-1)
    elif place.layer is not None and place.layer < 0:
        raise ConfigError(f"layer {place.layer} was given. Count from the first block, which is 0.")
    if not all_finite(vector):
        raise StoreError(f"The direction in {str(path)!r} holds non-finite values. Choose another, or make it again.")
    if lengths is not None:
        length, longest = float(vector.double().norm()), float(lengths.nan_to_num(0.0, posinf=0.0).max())
        if length <= NOISE * longest:
            raise StoreError(
                f"The direction of layer {place.layer} in {str(path)!r} is rounding noise: its length is {length:.2g}, "
                f"the longest is {longest:.2g}. At the embeddings, equal tokens cancel; choose a later layer."
            )
    return vector


def _site(dims: int, place: _Place) -> Site | None:
    if place.layer is None:
        return None
    if dims == 2 and place.layer > 0:
        return Site(place.layer - 1, "resid_post")
    return Site(place.layer, "resid_pre")
