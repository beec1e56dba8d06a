"""Ablation in the weights: a checkpoint that cannot write a subspace to its residual stream.

The counterpart of `Ablate` without hooks: exact in real arithmetic wherever the stream is a sum of what weights write
to it, and refused wherever it is not. For edits of single sites or tokens, see `ablate.py`.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from subspace_probe.core.errors import ConfigError, StoreError
from subspace_probe.core.files import atomic_folder
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.sites import resolve_sites
from subspace_probe.core.subspaces import Subspace
from subspace_probe.interventions.ablate import PUBLISHED, Ablate
from subspace_probe.linalg import bases, projections
from subspace_probe.models import METADATA, HookedModel
from subspace_probe.models.layouts import Layout
from subspace_probe.models.weights import adapters, stream_writers, untie

_ROWS = 4096
"""How many rows of a matrix are in float64 at once."""
_PROBE = 16
"""Tokens of the pass that looks for what the weights do not explain."""


def orthogonalize_weights(model: HookedModel, subspace: Subspace, *, copy: bool = True) -> HookedModel:
    """The model with a subspace taken out of every weight that writes to the residual stream.

    W <- W - U^T U W (Arditi et al. 2024, eq. 5) for token and position embeddings, the output projection of attention,
    the MLP's down projection, and all their biases; of every expert in mixtures of experts. Computed in float64 and
    rounded once. The unembedding reads the stream and stays as it was: where it shares the embedding's weight, it gets
    one of its own. Logits and texts are those of `Ablate(subspace)` up to rounding. The model given is left as it is.

    Args:
        model: of a family whose stream is the sum of what its weights write.
        subspace: of any rank; its `origin` is ignored, as in `Ablate`.
        copy: whether all weights are copied. False shares those that do not write to the stream with the model given,
            which saves their memory; changing them later changes both models.

    Raises:
        ConfigError: a family where it would not equal `Ablate` (norms behind what is written), adapters, quantised or
            offloaded weights, weights of unknown use, standing interventions, or a subspace with a reader of its own.
        ShapeError: a subspace of another width.
        StaleStore: a subspace of another model.
    """
    subspace.require_projection("taken out of the weights")
    _require_no_standing(model, "orthogonalise the weights")
    model.check(Ablate(subspace))
    backend = model.backend
    stream_writers(backend.hf, backend.layout)  # refuses before anything is copied
    hf = _copied(backend.hf, backend.layout, whole=copy)
    untie(hf)
    basis = bases.orthonormalise(subspace.basis.detach().cpu().double())
    with torch.no_grad():
        for rows in stream_writers(hf, backend.layout).values():
            for matrix in rows.unbind() if rows.ndim == 3 else (rows,):
                _take_out(matrix, basis)
    baked = HookedModel(
        type(backend)(hf, name=f"{model.spec.name} without {subspace.rank} of {subspace.width} dimensions"),
        model.tokenizer,
        template_kwargs=model.template_kwargs,
        words=model.words,
    )
    _require_absent(baked, model, basis)
    return baked


def save_checkpoint(model: HookedModel, folder: str | Path) -> Path:
    """Write a model as an ordinary Hugging Face checkpoint, which `load_model` and Transformers read.

    Weights, configuration, generation settings, tokenizer and chat template, and the words that stand for behaviours.
    Options of the chat template (`template_kwargs`) belong to loading and are not written.

    Args:
        model: without standing interventions or adapters, which are not weights.
        folder: a new or an empty one, so that no file of another model is left in it.

    Raises:
        StoreError: a folder that holds files, or a place that cannot be written.
        ConfigError: standing interventions or adapters.
    """
    folder, hf = Path(folder), model.backend.hf
    _require_no_standing(model, "save it")
    if adapters(hf):
        raise ConfigError(
            "The model has adapters, so its weights alone are another model. Merge them (merge_and_unload)."
        )
    if folder.is_dir() and any(folder.glob("[!.]*")):
        raise StoreError(
            f"The folder {str(folder)!r} is not empty, and files of two models would mix. Choose a new one."
        )
    with atomic_folder(folder) as partial:
        try:
            hf.save_pretrained(partial)
            model.tokenizer.save_pretrained(partial)
            if model.words:
                text = json.dumps({"words": model.words}, indent=2, ensure_ascii=False)
                (partial / METADATA).write_text(text + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"Cannot write a checkpoint into {str(folder)!r}: {error}. Choose another place."
            ) from None
    return folder


def _require_no_standing(model: HookedModel, asked: str) -> None:
    if model.standing_sites:
        raise ConfigError(
            f"The model has standing interventions (intervened), which are not in its weights; cannot {asked}. "
            "Give the model they were put on."
        )


def _copied(hf: Any, layout: Layout, *, whole: bool) -> Any:
    """A copy of the modules, with all weights copied or only those that write to the stream."""
    written = {id(hf.base_model.get_parameter(name)) for name in stream_writers(hf, layout)}
    kept = [] if whole else [weight for weight in hf.parameters() if id(weight) not in written]
    return deepcopy(hf, {id(weight): weight for weight in kept})


def _take_out(rows: Float[Tensor, "n d"], basis: Float[Tensor, "k d"]) -> None:
    """Project rows in place, a part at a time, in float64 where the device has it."""
    device = rows.device
    on = basis.to(device, torch.float32 if device.type == "mps" else torch.float64)
    for part in rows.split(_ROWS):
        part.copy_(projections.reject(part, on))


def _require_absent(baked: HookedModel, model: HookedModel, basis: Float[Tensor, "k d"]) -> None:
    """Check on random tokens that nothing writes the subspace: hooks and patched modules are not among the weights.

    Raises:
        ConfigError: with the first site that holds a part of it.
    """
    spec, generator = model.spec, torch.Generator().manual_seed(0)
    length = min(_PROBE, spec.context // 4)  # as text, they may become more tokens
    ids = torch.randint(min(spec.d_vocab, len(model.tokenizer)), (length,), generator=generator)
    batch = model.tokens(Prompt(text=model.tokenizer.decode(ids), raw=True))
    sites = resolve_sites(PUBLISHED, spec.n_layers)
    reads, before = baked.run(batch, reads=sites).reads, model.run(batch, reads=sites).reads
    # a weight rounded to half precision leaves a little of what was taken out
    tolerance = 1e-4 if model.backend.dtype in (torch.float32, torch.float64) else 5e-2
    for site in sites:
        left = float(projections.coords(reads[site].cpu().double(), basis).abs().max())
        scale = max(float(x.abs().max()) for x in (reads[site], before[site]))
        if not left <= tolerance * scale:
            raise ConfigError(
                f"{spec.family} still writes the subspace at {site.short} ({left:.2g} on activations of {scale:.2g}): "
                "something besides its weights reaches the residual stream, such as a hook or a patched module. Remove "
                "it, or take the subspace out at run time (Ablate)."
            )
