"""A guard on disk: guard.json says what it is and what it was made from, guard.safetensors holds its numbers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from subspace_probe.core.errors import StaleStore, StoreError, SubspaceProbeError
from subspace_probe.core.files import atomic_folder
from subspace_probe.core.plain import plain
from subspace_probe.core.reports import installed_versions
from subspace_probe.guard import reading
from subspace_probe.guard.calibration import Calibration
from subspace_probe.guard.classifier import G, GuardClassifier
from subspace_probe.guard.layer_choice import LayerScore
from subspace_probe.guard.probe import LatentProbe
from subspace_probe.guard.residual_gate import ResidualGate
from subspace_probe.guard.stream_rule import Streaming
from subspace_probe.guard.thresholds import Threshold
from subspace_probe.models.hooked import HookedModel

FORMAT = "subspace-probe/guard/1"
JSON, TENSORS = "guard.json", "guard.safetensors"


@final
@dataclass(frozen=True)
class _Shape:
    """The size of the model in guard.json."""

    name: str
    n_layers: int
    d_model: int


def save_guard(guard: GuardClassifier, folder: Path) -> Path:
    """Write a fitted guard; whole or not at all.

    Raises:
        ConfigError: a guard that is not fitted.
        StoreError: the place cannot be written.
    """
    described = guard.describe() | {"sites": [site.short for site in guard.sites]}
    parts: dict[str, Mapping[str, NDArray[Any]]] = {"probe": guard.probe.tensors()}
    if guard.gate is not None:
        parts["gate"] = guard.gate.tensors()
    if guard.calibration is not None:
        parts["calibration"] = guard.calibration.numbers
    if guard.streaming is not None and guard.streaming.probe is not None:
        parts["streaming"] = guard.streaming.probe.tensors()
    body = {
        "format": FORMAT,
        **described,
        "d_model": guard.model.spec.d_model,
        "probe": guard.probe.get_params(),
        "gate": None if guard.gate is None else guard.gate.get_params(),
        "layer_scores": {str(layer): asdict(score) for layer, score in guard.layer_scores.items()},
        "seen": {use: sorted(keys) for use, keys in guard.seen.items()},
        "streaming": None if guard.streaming is None else guard.streaming.describe(),
        "versions": installed_versions(),
    }
    tensors = {
        f"{part}.{name}": np.ascontiguousarray(value) for part, held in parts.items() for name, value in held.items()
    }
    with atomic_folder(folder) as partial:
        save_file(tensors, partial / TENSORS)
        (partial / JSON).write_text(json.dumps(plain(body), indent=1, allow_nan=False), encoding="utf-8")
    return folder


def describe_saved(folder: Path) -> dict[str, Any]:
    """What guard.json says, without a model.

    Raises:
        StoreError: no guard there, or a damaged one.
    """
    path = folder / JSON
    try:
        body: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"No guard in {str(folder)!r}: it has no {JSON}. LatentGuard.save writes one.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"Cannot read the guard {str(path)!r}: {error}.") from None
    if not isinstance(body, dict) or cast("dict[str, Any]", body).get("format") != FORMAT:
        raise StoreError(f"{str(path)!r} is not a guard of this package: expected format {FORMAT!r}.")
    return cast("dict[str, Any]", body)


def load_guard(kind: type[G], folder: Path, model: HookedModel, *, allow_model_mismatch: bool = False) -> G:
    """Read a guard; see `LatentGuard.load`."""
    body = describe_saved(folder)
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"Cannot read the guard's numbers, {str(folder / TENSORS)!r}: {error}.") from None
    try:
        reading.require_like(_Shape(body["model"], body["n_layers"], body["d_model"]), body["template"], model)
        guard = _guard(kind, body, tensors, model)
    except SubspaceProbeError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"A damaged guard in {str(folder)!r}: {type(error).__name__} {error}. Make it anew.") from None
    _require_model(guard, body, model, allow_model_mismatch=allow_model_mismatch)
    return guard


def _guard(kind: type[G], body: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], model: HookedModel) -> G:
    def part(name: str) -> dict[str, NDArray[Any]]:
        return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

    guard = kind(model, stream=body["stream"], layers=body["layers"], where=body["where"], category=body["category"])
    guard.probe = LatentProbe.from_tensors(body["probe"], part("probe"))
    guard.gate = None if body["gate"] is None else ResidualGate.from_tensors(body["gate"], part("gate"))
    guard.layers = tuple(body["layers"])
    guard.layer_scores = {int(layer): LayerScore(**score) for layer, score in body["layer_scores"].items()}
    guard.calibration = None if body["calibrated"] is None else Calibration(body["calibrated"], part("calibration"))
    guard.threshold = None if body["threshold"] is None else Threshold(**body["threshold"])
    guard.seen = {use: frozenset(keys) for use, keys in body["seen"].items()}
    guard.fitted_on, guard.fitted_name, guard.nuisance = body["fingerprint"], body["model"], body["nuisance"]
    if body["streaming"] is not None:
        guard.streaming = Streaming.of(body["streaming"], part("streaming"))
    return guard


def _require_model(
    guard: GuardClassifier, body: Mapping[str, Any], model: HookedModel, *, allow_model_mismatch: bool
) -> None:
    """That the guard's promise, or where it has none its probe, was made on this very model."""
    held = guard.threshold
    wanted = held.fingerprint if held is not None else guard.fitted_on
    if model.fingerprint != wanted and not allow_model_mismatch:
        made = "has its threshold from" if held is not None else "was made for"
        raise StaleStore(
            f"The guard {made} {body['model']} ({wanted[:8]}), and {model.spec.name} has other weights or another "
            f"vocabulary ({model.fingerprint[:8]}). Load the guard's own model, or pass allow_model_mismatch=True "
            "(--allow-model-mismatch) and set the threshold anew: what it promises holds for those weights."
        )
