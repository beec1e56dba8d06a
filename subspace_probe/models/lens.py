"""TransformerLens' bridge: reads and edits at its canonical hook points.

The bridge computes attention itself, in the open, so what agrees here with the native backend was computed twice. It
rewires the modules of the model it is given, so it is given a twin: the user's model is not changed. The twin has the
user's weights, except where the bridge splits fused query, key and value matrices into copies: after changing weights
in place, load the model again.
"""

import copy
import threading
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from subspace_probe.core.errors import BackendError
from subspace_probe.core.sites import Stream
from subspace_probe.models.backend import Backend, Output
from subspace_probe.models.hooks import Hook, Pass, Stop, registered
from subspace_probe.models.weights import adapters, version, weights_of

# `resid_mid` has no row: its hook point is the second norm's input, where an edit would not move the stream.
# `mlp_post` is named by its projection: in mixtures of experts "mlp.hook_post" is the MLP's output.
_POINTS: Mapping[Stream, str] = {
    "resid_pre": "hook_resid_pre",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
    "attn_out": "hook_attn_out",
    "mlp_post": "mlp.out.hook_in",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
_NATIVE = "Use backend='native'."
_PROBE = 12  # tokens

# Silencing the warnings of a boot changes the process-wide filters, so two boots at once would restore the wrong ones.
_BOOTING = threading.Lock()


@final
@dataclass(frozen=True, eq=False)
class _Lens:
    """A bridge, and its hook point for each stream of each block."""

    bridge: Any
    points: Mapping[tuple[int, Stream], nn.Module]


@final
class LensModel(Backend):
    """A Hugging Face model behind `transformer_lens.model_bridge.TransformerBridge`, of version 3.9 or 4."""

    def _prepare(self) -> None:
        if self._spec.encoder:
            raise BackendError(
                f"{self._spec.family} is an encoder, which is not run through TransformerLens. {_NATIVE}"
            )
        self._idle: list[_Lens] = [self._boot()]
        self._made_of = _made_of(self.hf)
        self._require_parity()

    @property
    def _forms_patterns(self) -> bool:
        return True  # the twin's attention is eager, whatever the user's model has

    def _call(self, state: Pass, inputs: dict[str, Any]) -> Output | None:
        ids, rest = inputs["input_ids"], {name: value for name, value in inputs.items() if name != "input_ids"}
        with self._lens() as lens, registered(_hooks(lens, state)):
            try:
                logits, cache = lens.bridge(ids, return_type="logits_and_cache", **rest)
            except Stop:
                return None
        return Output(logits, cache)

    @contextmanager
    def _lens(self) -> Generator[_Lens]:
        """A bridge that no other pass is using, booted where there is none.

        Bridges keep what they are doing in their modules, and their hooks know no threads: of two passes through one,
        in two threads or one inside an edit of the other, both may come out wrong without an error.
        """
        if self._made_of != (made_of := _made_of(self.hf)):
            # adapters switched, weights replaced: a twin would go on as it was
            self._idle, self._made_of = [], made_of
        idle = self._idle
        try:
            lens = idle.pop()  # atomic, as is append
        except IndexError:
            lens = self._boot()
        try:
            yield lens
        finally:
            idle.append(lens)

    def _boot(self) -> _Lens:
        """A bridge over a twin of the model, by none of the names that TransformerLens looks up on the hub."""
        family = self._spec.family
        with _BOOTING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                from transformer_lens.model_bridge.sources import build_bridge_from_module
            except ImportError as error:
                raise BackendError(
                    f"This backend needs transformer-lens 3.9 or newer: {error}. pip install 'transformer-lens>=3.9'"
                ) from None
            twin = copy.deepcopy(self.hf, {id(weight): weight for weight in self.hf.parameters()})
            twin.set_attn_implementation("eager")
            with _refusing(family):
                bridge = build_bridge_from_module(twin, family, hf_config=twin.config)
        known, points = bridge.hook_dict, dict[tuple[int, Stream], nn.Module]()
        for layer in range(self._spec.n_layers):
            for stream, point in _POINTS.items():
                if stream in self._spec.unsupported or (stream == "mlp_post" and self._mlp_widths[layer] is None):
                    continue
                if (name := f"blocks.{layer}.{point}") not in known:  # a hook by such a name would never fire
                    raise BackendError(f"TransformerLens has no hook point {name} in {family}. {_NATIVE}")
                points[layer, stream] = known[name]
        return _Lens(bridge, points)

    @torch.no_grad()
    def _require_parity(self) -> None:
        """Check that the bridge, another implementation, computes what the model does; it may be of another variant."""
        positions = torch.arange(min(_PROBE, self._spec.context), device=self.device)[None]
        ids, mask = positions % self._spec.d_vocab, torch.ones_like(positions)
        inputs = self._named_inputs(ids, mask, positions, 0) | {"use_cache": False}
        wanted = self.hf(**inputs).logits
        with _refusing(self._spec.family):
            out = self._call(Pass(frozenset(), {}, self._spec.n_heads, None, False), inputs)
        error, scale = _distance(None if out is None else out.logits, wanted), float(wanted.abs().max())
        tolerance = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 5e-2
        if not error <= tolerance * scale:
            raise BackendError(
                f"TransformerLens computes this {self._spec.family} differently: logits are off by {error:.3g}, where "
                f"the largest is {scale:.3g}. {_NATIVE}"
            )


@final
@dataclass(frozen=True, eq=False)
class _Visit:
    """Visits a stream as it passes its hook point; with `through_attn`, `resid_mid` too, by way of `attn_out`."""

    state: Pass
    layer: int
    stream: Stream
    through_attn: bool

    def __call__(self, point: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        x = self.state.visit(self.layer, self.stream, x)
        if self.through_attn and self.stream == "resid_pre":
            self.state.pre[self.layer] = x
        if self.through_attn and self.stream == "attn_out":
            mid = self.state.pre.pop(self.layer) + x
            x = x + (self.state.visit(self.layer, "resid_mid", mid) - mid)
        return x


def _made_of(hf: Any) -> tuple[int | str, ...]:
    """Changes when a module is put in another's place, a weight replaced or written to, or adapters are switched."""
    return (*map(id, hf.modules()), *version(weights_of(hf)), adapters(hf))


def _hooks(lens: _Lens, state: Pass) -> list[Hook]:
    """What a pass needs on the hook points.

    As hooks of Torch: `TransformerBridge.hooks` looks up each name among all names, which takes longer than the pass,
    and reshapes `z`, which is already as wide as the output projection.
    """
    hooks: list[Hook] = []
    for layer in sorted({site.layer for site in state.sites}):
        asked = {site.stream for site in state.sites if site.layer == layer}
        through_attn = "resid_mid" in asked
        needed = asked | ({"resid_pre", "attn_out"} if through_attn else set())
        for stream in _POINTS:
            if stream in needed:
                call = _Visit(state, layer, stream, through_attn)
                hooks.append(Hook(lens.points[layer, stream], call, entry=False))
    return hooks


@contextmanager
def _refusing(family: str) -> Generator[None]:
    """Turn what TransformerLens fails with, on a model that it does not know, into an error that says so."""
    try:
        yield
    except (ValueError, RuntimeError, AttributeError, LookupError, TypeError) as error:
        cause = str(error).split("\n")[0]
        raise BackendError(f"TransformerLens cannot take this {family}: {cause}. {_NATIVE}") from error


def _distance(found: Tensor | None, wanted: Tensor) -> float:
    """Largest deviation; infinite where there is nothing, or something of another shape."""
    if found is None or found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max())
