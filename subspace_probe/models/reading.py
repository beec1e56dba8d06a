"""The weight matrices that write into a site's stream and those that read it, for every family.

Matrices are given as vectors of the site's own space: a reader's rows, a writer's columns. The gain of a norm that lies
between a matrix and the stream is multiplied in, and a LayerNorm's centring too, so that a vector means the same at
every matrix of a site; what a norm divides by is one number a token and turns no direction. Biases are left out.

Writers are named by the family's `Layout`. Readers are found by following one token through the block: whatever matrix
is shown the stream, through a norm or not, reads it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from subspace_probe.core.errors import BackendError, UnsupportedSite
from subspace_probe.core.sites import Site
from subspace_probe.models.backend import Backend
from subspace_probe.models.hooks import Hook, first, module_input, registered
from subspace_probe.models.layouts import FUSED
from subspace_probe.models.weights import stored

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 2048


@final
@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix as vectors in the space of a site of width d.

    Attributes:
        name: the weight's Hugging Face name.
        weight: shape [n, d], as it is stored: a reader's output rows, a writer's input columns.
        gain: of the norm between the matrix and the stream, shape [d]; None where there is none.
        centred: whether that norm takes the mean over channels away.
    """

    name: str
    weight: Float[Tensor, "n d"]
    gain: Float64[Tensor, " d"] | None = None
    centred: bool = False

    def vectors(self) -> Iterator[Float64[Tensor, "b d"]]:
        """The vectors in float64 on the CPU, a block at a time."""
        for start in range(0, len(self.weight), _BLOCK):
            rows = self.weight[start : start + _BLOCK].detach().to("cpu", torch.float64)
            rows = rows if self.gain is None else rows * self.gain
            yield rows - rows.mean(dim=1, keepdim=True) if self.centred else rows


def writers(backend: Backend, site: Site) -> list[Matrix]:
    """The matrices of one block whose output is added to the site's stream, as their columns.

    `attn_out` and `mlp_out` have one, `resid_post` both, `resid_mid` the attention's, `resid_pre` the block below's.

    Raises:
        UnsupportedSite: a site that no single matrix writes to, with the reason.
        BackendError: quantised weights, or adapters that are not merged.
    """
    site = _checked(backend, site)
    layer, layout = site.layer, backend.layout
    if site.stream in ("z", "mlp_post"):
        raise UnsupportedSite(f"{site.short} lies behind a nonlinearity, so no matrix writes to it. Use what reads it.")
    if site.stream == "resid_pre":
        if layer == 0:
            raise UnsupportedSite(f"{site.short} is written by the embeddings, and by no block. Use a later layer.")
        return writers(backend, Site(layer - 1, "resid_post"))
    if layout.post_norm and site.stream.startswith("resid"):
        raise UnsupportedSite(f"{site.short} is normed after the addition in this family. Use attn_out or mlp_out.")
    found = [_writer(backend, layer, layout.attn, layout.z)] if site.stream != "mlp_out" else []
    if site.stream in ("mlp_out", "resid_post"):
        if not layout.mlp_post:
            raise UnsupportedSite(f"{site.short} has no matrix of its MLP that could be named: {FUSED}")
        found.append(_writer(backend, layer, layout.mlp, layout.mlp_post))
    return found


def readers(backend: Backend, site: Site) -> list[Matrix]:
    """The matrices that read a site next, as their rows.

    `z` and `mlp_post` are read by the projection behind them; `resid_pre` by the attention and the MLP of its block,
    `resid_mid` by the MLP; `resid_post` by the next block, and after the last one by the unembedding; `attn_out` and
    `mlp_out` by what reads the stream that they are added to.

    Raises:
        UnsupportedSite: a site that no matrix reads, with the reason.
        BackendError: quantised weights, or adapters that are not merged.
    """
    site = _checked(backend, site)
    layer, layout, spec = site.layer, backend.layout, backend.spec
    if site.stream in ("z", "mlp_post"):
        return [_projection(backend, site)]
    if layout.post_norm and site.stream in ("attn_out", "mlp_out"):
        raise UnsupportedSite(f"{site.short} is normed before it is read in this family. Use resid_mid or resid_post.")
    parallel = "resid_mid" in spec.unsupported
    if site.stream in ("resid_post", "mlp_out") or (site.stream == "attn_out" and parallel):
        if layer + 1 == spec.n_layers:
            return [_unembedding(backend, site)]
        site = Site(layer + 1, "resid_pre")
    if not layout.mlp_post:
        raise UnsupportedSite(f"{site.short} is read by an MLP whose matrices cannot be named: {FUSED}")
    streams = ("resid_pre", "resid_mid") if site.stream == "resid_pre" else ("resid_mid",)
    return _traced(backend, site.layer, streams)


def _checked(backend: Backend, site: Site) -> Site:
    backend.width(site)  # refuses what the family does not have
    if getattr(backend.hf.config, "quantization_config", None) is not None:
        raise BackendError(f"{backend.spec.name} is quantised, so its weights are codes. Load it without quantisation.")
    if any(name.endswith(".base_layer") for name, _ in backend.hf.named_modules()):  # what PEFT wraps a matrix in
        raise BackendError(f"{backend.spec.name} has adapters beside its weights. Call merge_and_unload() first.")
    return site.resolve(backend.spec.n_layers)


def _numbers(backend: Backend, module: nn.Module) -> tuple[str, Tensor]:
    """A module's weight by its full name, oriented [out, in], wherever it is stored.

    Raises:
        BackendError: quantised, or not there.
    """
    from transformers.pytorch_utils import Conv1D

    name = next(name for name, other in backend.hf.named_modules() if other is module) + ".weight"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in _PLAIN:
        kind = type(module).__name__ if weight is None else f"{str(weight.dtype)[6:]} of shape {tuple(weight.shape)}"
        raise BackendError(f"{name} is {kind} and no plain matrix. Load the model without quantisation.")
    weight = stored(backend.hf, name, weight).detach()
    return name, weight.T if isinstance(module, Conv1D) else weight


def _writer(backend: Backend, layer: int, adds: str, projection: str) -> Matrix:
    """Columns of a projection, under the gain of a norm that lies behind it."""
    block = backend.blocks[layer]
    name, weight = _numbers(backend, block.get_submodule(projection))
    if projection == adds or projection.startswith(f"{adds}."):
        return Matrix(name, weight.T)
    gain, centred = _gain(backend, block.get_submodule(adds))
    if centred:
        raise UnsupportedSite(f"{name} writes through a LayerNorm ({adds}), which is not supported. Use what reads it.")
    return Matrix(name, weight.T, gain)


def _projection(backend: Backend, site: Site) -> Matrix:
    path = backend.layout.z if site.stream == "z" else backend.layout.mlp_post
    name, weight = _numbers(backend, backend.blocks[site.layer].get_submodule(path))
    if site.head is None:
        return Matrix(name, weight)
    size = backend.spec.d_head
    return Matrix(name, weight[:, site.head * size : (site.head + 1) * size])


def _unembedding(backend: Backend, site: Site) -> Matrix:
    head = backend.hf.get_output_embeddings()
    if head is None or not backend.layout.norm:
        raise UnsupportedSite(f"{site.short} is read by no matrix of this model: there is no unembedding behind it.")
    name, weight = _numbers(backend, head)
    return Matrix(name, weight, *_gain(backend, backend.base.get_submodule(backend.layout.norm)))


def _gain(backend: Backend, norm: nn.Module) -> tuple[Float64[Tensor, " d"], bool]:
    """What a norm multiplies each channel with, and whether it is a LayerNorm, which also centres."""
    if isinstance(norm, nn.LayerNorm):
        name = next(name for name, other in backend.hf.named_modules() if other is norm)
        return stored(backend.hf, f"{name}.weight", norm.weight).detach().to("cpu", torch.float64), True
    # some families keep the gain minus one; the norm of an even state is the gain itself, whatever is kept
    even = torch.full((backend.spec.d_model,), 1e3, device=backend.device)
    with torch.no_grad():
        return norm(even[None])[0].to("cpu", torch.float64), False


@final
class _Tape:
    """What went into some modules and came out of them, the first time each was called."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.setdefault(module, _flat(module_input(args, kwargs)[0]))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.outputs.setdefault(module, _flat(first(output)))


def _flat(x: Tensor) -> Tensor:
    return x.detach().flatten().to("cpu", torch.float32, copy=True)  # a copy: some blocks add in place


def _traced(backend: Backend, layer: int, streams: tuple[str, ...]) -> list[Matrix]:
    """The matrices of a block that are shown one of these streams, in the order of its modules."""
    block, layout, tape = backend.blocks[layer], backend.layout, _Tape()
    sized = [m for m in block.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    norms = [m for m in sized if m.weight.ndim == 1]
    matrices = [m for m in sized if m.weight.ndim == 2]
    adds = block.get_submodule(layout.resid_mid or layout.attn)
    hooks = [Hook(m, tape.enter, entry=True) for m in (block, *norms, *matrices)]
    hooks += [Hook(m, tape.leave, entry=False) for m in dict.fromkeys((*norms, adds))]
    ids = torch.full((1, 1), 1, device=backend.device)
    with torch.no_grad(), registered(hooks):
        backend.hf(input_ids=ids, attention_mask=torch.ones_like(ids))
    pre = tape.inputs[block]
    states = {"resid_pre": pre, "resid_mid": tape.outputs[adds] if layout.post_norm else pre + tape.outputs[adds]}
    found: list[Matrix] = []
    for module in matrices:
        shown = tape.inputs.get(module)
        # where states are normed after each addition, what a matrix is shown is the state itself
        behind = [] if layout.post_norm else [n for n in norms if n in tape.outputs]
        norm = next((n for n in behind if shown is not None and torch.equal(tape.outputs[n], shown)), None)
        source = shown if norm is None else tape.inputs[norm]
        if source is not None and any(_same(source, states[stream], backend.dtype) for stream in streams):
            name, weight = _numbers(backend, module)
            found.append(Matrix(name, weight, *((None, False) if norm is None else _gain(backend, norm))))
    if not found:
        raise UnsupportedSite(f"No matrix of block {layer} reads {' or '.join(streams)} in {backend.spec.family}.")
    return found


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(b.abs().max())
