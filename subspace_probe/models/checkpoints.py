"""A checkpoint's weights one at a time, by name: from a folder, the hub, or a model in memory.

What is compared tensor by tensor need not be in memory whole. Not a loader of models: see `load_model`.
"""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from subspace_probe.core.errors import BackendError, ConfigError, ShapeError, StoreError
from subspace_probe.models.hooked import HookedModel
from subspace_probe.models.weights import adapters, stored, weights_of


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of a model, read when they are asked for.

    Attributes:
        name: where they come from.
        shapes: of every floating-point weight, by its Hugging Face name.
        read: the numbers of one of them, on the CPU, in their own dtype.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def open_checkpoint(source: HookedModel | str | Path) -> Checkpoint:
    """Open a model in memory, a folder of safetensors, or a hub id (whose files are downloaded, or found in its cache).

    Raises:
        StoreError: no such folder or hub id, no safetensors in it, or a damaged file.
        BackendError: a model with adapters or quantised weights.
    """
    if isinstance(source, HookedModel):
        return _in_memory(source)
    folder = Path(source)
    if not folder.is_dir():
        folder = _downloaded(str(source))
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # a folder may hold other files too, such as adapters
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [file for file in files if file.name in named]
    elif (whole := folder / "model.safetensors") in files:
        files = [whole]
    if not files:
        raise StoreError(f"No .safetensors in {str(folder)!r}. Save the checkpoint with save_pretrained.")
    shapes, places = _headers(files)

    def read(name: str) -> Tensor:
        with _opened(places[name]) as file:
            return file.get_tensor(name)

    return Checkpoint(str(source), shapes, read)


def shared_weights(*checkpoints: Checkpoint) -> tuple[str, ...]:
    """The names that all of them have, in the order of the first.

    A weight that only some have (a tied unembedding that is not written) is left out.

    Raises:
        ConfigError: no name in common: other families, or another naming.
        ShapeError: a weight of another shape.
    """
    first = checkpoints[0]
    names = [name for name in first.shapes if all(name in other.shapes for other in checkpoints)]
    if not names:
        listed = "; ".join(f"{c.name}: {next(iter(c.shapes), 'nothing')}, ..." for c in checkpoints)
        raise ConfigError(f"The checkpoints have no weight of one name in common ({listed}). Compare one model's own.")
    for other in checkpoints[1:]:
        for name in names:
            if first.shapes[name] != other.shapes[name]:
                raise ShapeError(
                    f"{name} has shape {first.shapes[name]} in {first.name} and {other.shapes[name]} in {other.name}, "
                    "which cannot be subtracted. Compare checkpoints of one model."
                )
    return tuple(names)


def vocabulary_weights(model: HookedModel) -> frozenset[str]:
    """The names of the token embeddings and the unembedding: one side of these is the vocabulary."""
    hf: Any = model.backend.hf
    ends = [end for end in (hf.get_input_embeddings(), hf.get_output_embeddings()) if end is not None]
    own = {id(value) for end in ends for value in end.parameters()}
    return frozenset(name for name, value in hf.named_parameters(remove_duplicate=False) if id(value) in own)


@contextmanager
def rewritten(model: HookedModel) -> Generator[Callable[[str, Tensor], None]]:
    """Write to weights of a model for as long as the block lasts; then every one is as it was, bit by bit.

    Yields:
        A function of a weight's name and its new numbers, which are rounded to the weight's own dtype.

    Raises:
        BackendError: adapters or quantised weights.
    """
    weights = _plain_weights(model)
    before: dict[str, Tensor] = {}

    @torch.no_grad()
    def write(name: str, value: Tensor) -> None:
        if name not in before:
            before[name] = weights[name].detach().clone()
        weights[name].copy_(value)

    try:
        yield write
    finally:
        with torch.no_grad():
            for name, value in before.items():
                weights[name].copy_(value)


def _plain_weights(model: HookedModel) -> dict[str, Tensor]:
    hf: Any = model.backend.hf
    if adapters(hf) or getattr(hf, "is_quantized", False):
        raise BackendError(
            f"{model.spec.name} has adapters or quantised weights, which cannot be subtracted. Merge the adapters, or "
            "load it unquantised."
        )
    return {name: value for name, value in weights_of(hf).items() if value.is_floating_point()}


def _in_memory(model: HookedModel) -> Checkpoint:
    weights = _plain_weights(model)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return Checkpoint(
        model.spec.name, shapes, lambda name: stored(model.backend.hf, name, weights[name]).detach().cpu().clone()
    )


def _downloaded(source: str) -> Path:
    if Path(source).is_absolute() or source.startswith("."):
        raise StoreError(f"No checkpoint folder {source!r}. Give a folder with .safetensors, or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise StoreError(f"Cannot open the checkpoint {source!r}: {first} Give a folder or a hub id.") from None


def _headers(files: list[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                part = file.get_slice(name)
                if part.get_dtype() in ("F64", "F32", "F16", "BF16"):
                    shapes[name], places[name] = tuple(part.get_shape()), path
    return shapes, places


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    opened: Any = safe_open  # untyped in safetensors
    try:
        with opened(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error}. Download or save it again.") from None
