"""The two files of a sparse autoencoder, `cfg.json` and `sae_weights.safetensors`. No code runs on load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspace_probe.core.errors import ConfigError, StoreError
from subspace_probe.core.files import atomic_folder
from subspace_probe.dictionaries.configuration import Configuration

CONFIGURATION, WEIGHTS = "cfg.json", "sae_weights.safetensors"

_DTYPES = {
    name: dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for name in (str(dtype), str(dtype).removeprefix("torch."))
}


def read_folder(path: Path) -> tuple[Configuration, dict[str, Tensor], torch.dtype]:
    """The configuration, the tensors as they lie in the file, and the dtype they are to be used in.

    Raises:
        StoreError: a file that is missing or damaged.
        ConfigError: a configuration that is not supported, with the key.
    """
    body = _json(path / CONFIGURATION)
    try:
        configuration = Configuration.parse(body)
    except ConfigError as error:
        raise ConfigError(f"Cannot read {str(path / CONFIGURATION)!r}: {error}") from None
    name = body.get("dtype", "float32")
    if name not in _DTYPES:
        raise ConfigError(f"{str(path / CONFIGURATION)!r} has dtype={name!r}. Known: {', '.join(sorted(_DTYPES))}.")
    try:
        tensors = load_file(path / WEIGHTS)
    except FileNotFoundError:
        raise StoreError(f"No file {str(path / WEIGHTS)!r} beside {CONFIGURATION}. Copy both files.") from None
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{str(path / WEIGHTS)!r} is not a readable safetensors file: {error}") from None
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not bool((scaling == 1).all()):
        raise StoreError(
            f"{str(path / WEIGHTS)!r} holds a tensor 'scaling_factor' other than ones. Such fine-tuned scales are not "
            "supported; multiply the rows of W_dec by it and leave it out."
        )
    return configuration, tensors, _DTYPES[name]


def write_folder(path: Path, configuration: Configuration, tensors: Mapping[str, Tensor]) -> None:
    """Write both files; whole or not at all.

    Raises:
        StoreError: the place cannot be written.
        ConfigError: metadata that are not plain JSON values.
    """
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    try:
        text = json.dumps(configuration.to_json(dtype), indent=1, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The metadata of a sparse autoencoder cannot be written as JSON: {error}.") from None
    # copies: a view would be written with all that lies behind it
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with atomic_folder(path) as partial:
        (partial / CONFIGURATION).write_text(text + "\n", encoding="utf-8")
        save_file(plain, partial / WEIGHTS)


def _json(path: Path) -> dict[str, Any]:
    try:
        body: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"No file {str(path)!r}. A sparse autoencoder is a folder with {CONFIGURATION} in it."
        ) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{str(path)!r} is not a readable JSON file: {error}") from None
    if not isinstance(body, dict):
        raise StoreError(f"{str(path)!r} holds a {type(body).__name__}, not an object of settings.")
    return cast("dict[str, Any]", body)
