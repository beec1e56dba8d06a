"""The hooks of one pass: what they share, and where each stream of a block is caught.

One hook per module side edits and then reads every site there, because hooks of one module run in the order of their
registration. A hook acts only on the thread that started the pass.
"""

import threading
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from subspace_probe.core.edits import EditContext, EditMap
from subspace_probe.core.errors import ShapeError
from subspace_probe.core.sites import Site, Stream
from subspace_probe.models.layouts import Layout

_REGISTERING = threading.Lock()


class Stop(Exception):
    """Ends a pass after the deepest site; never leaves this module."""


@final
@dataclass(frozen=True)
class Hook:
    """One hook that a pass needs.

    Attributes:
        call: an entry hook takes (module, args, kwargs). Another thread that is inside the module while the hook is
            removed calls it without kwargs, so they are optional, and without them the pass is not ours.
        entry: whether it sees the module's input; else its output.
    """

    module: nn.Module
    call: Callable[..., Any]
    entry: bool


@final
@dataclass(eq=False)
class Pass:
    """What the hooks of one pass share."""

    reads: frozenset[Site]
    writes: EditMap
    n_heads: int
    stop_after: Site | None
    grad: bool
    thread: int = field(default_factory=threading.get_ident)
    ctx: EditContext | None = None
    pre: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    captured: dict[Site, Tensor] = field(default_factory=dict[Site, Tensor])
    fired: set[Site] = field(default_factory=set[Site])

    @property
    def mine(self) -> bool:
        return threading.get_ident() == self.thread

    def visit(self, layer: int, stream: Stream, x: Tensor) -> Tensor:
        """Edit, then read, every site of one stream of one block."""
        here = [site for site in self.writes if site.layer == layer and site.stream == stream]
        for site in here:
            x = self._edited(site, x)
            self.fired.add(site)
        for site in self.reads:
            if site.layer == layer and site.stream == stream:
                value = x if site.head is None else x.unflatten(-1, (self.n_heads, -1))[..., site.head, :]
                self.captured[site] = value if self.grad else value.detach()
                self.fired.add(site)
        if self.stop_after is not None and (layer, stream) == (self.stop_after.layer, self.stop_after.stream):
            self.fired.add(self.stop_after)
            raise Stop
        return x

    def _edited(self, site: Site, x: Tensor) -> Tensor:
        assert self.ctx is not None  # noqa: S101  (set before every forward pass)
        if site.head is None:
            return self._checked(site, x, self.writes[site](x, self.ctx))
        heads = list(x.unflatten(-1, (self.n_heads, -1)).unbind(-2))
        heads[site.head] = self._checked(site, heads[site.head], self.writes[site](heads[site.head], self.ctx))
        return torch.stack(heads, dim=-2).flatten(-2)

    def _checked(self, site: Site, x: Tensor, edited: Tensor) -> Tensor:
        if edited.shape != x.shape:
            raise ShapeError(
                f"The edit at {site.short} returned shape {tuple(edited.shape)} for activations of shape "
                f"{tuple(x.shape)}. An edit returns the shape it was given."
            )
        bad = (~edited.isfinite()).flatten(1).any(dim=1)
        if bool(bad.any()) and bool(x.isfinite().all()):
            rows = bad.nonzero().flatten().tolist()
            raise ShapeError(
                f"The edit at {site.short} returned non-finite values in rows {rows[:10]}. Lower its strength."
            )
        return edited.to(x.device, x.dtype)


@final
@dataclass(frozen=True, eq=False)
class _Entering:
    """Visits a stream that is a module's input."""

    state: Pass
    layer: int
    stream: Stream
    keep: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or not self.state.mine:
            return None
        x, rest, named = module_input(args, kwargs)
        x = self.state.visit(self.layer, self.stream, x)
        if self.keep:
            self.state.pre[self.layer] = x
        return (x, *rest), named


@final
@dataclass(frozen=True, eq=False)
class _Leaving:
    """Visits the streams that a module's output is, one after the other; `resid_mid` may be one through `attn_out`."""

    state: Pass
    layer: int
    streams: tuple[Stream, ...]
    through_attn: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.state.mine:
            return None
        x = first(output)
        for stream in self.streams:
            if stream == "resid_mid" and self.through_attn:
                mid = self.state.pre.pop(self.layer) + x
                # adding the difference moves the stream itself, which the second norm's input would not
                x = x + (self.state.visit(self.layer, "resid_mid", mid) - mid)
            else:
                x = self.state.visit(self.layer, stream, x)
        return (x, *output[1:]) if isinstance(output, tuple) else x


@final
@dataclass(frozen=True, eq=False)
class Recorder:
    """Keeps what a block was called with: its input, and in `rest` everything besides."""

    state: Pass
    inputs: list[Tensor] = field(default_factory=list[Tensor])
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list[Any])

    @property
    def rest(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by position and by name, without the input."""
        return self.calls[0]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None and self.state.mine:
            x, rest, named = module_input(args, kwargs)
            self.inputs.append(x)
            self.calls.append((rest, named))


def hook_block(block: nn.Module, layout: Layout, layer: int, streams: Collection[Stream], state: Pass) -> list[Hook]:
    """The hooks that one block needs for the given streams."""
    through_attn = "resid_mid" in streams and not layout.post_norm
    hooks = list[Hook]()
    if "resid_pre" in streams or through_attn:
        hooks.append(Hook(block, _Entering(state, layer, "resid_pre", keep=through_attn), entry=True))
    if "z" in streams:
        hooks.append(Hook(block.get_submodule(layout.z), _Entering(state, layer, "z"), entry=True))
    if "mlp_post" in streams:
        hooks.append(Hook(block.get_submodule(layout.mlp_post), _Entering(state, layer, "mlp_post"), entry=True))
    # one hook a module: attn_out and a resid_mid written through it are visited by the same one
    attn: list[Stream] = ["attn_out"] if "attn_out" in streams else []
    if through_attn:
        attn.append("resid_mid")
    outputs: list[tuple[str, list[Stream]]] = [
        (layout.attn, attn),
        (layout.resid_mid, ["resid_mid"] if "resid_mid" in streams and not through_attn else []),
        (layout.mlp, ["mlp_out"] if "mlp_out" in streams else []),
        ("", ["resid_post"] if "resid_post" in streams else []),
    ]
    for path, names in outputs:
        if names:
            call = _Leaving(state, layer, tuple(names), through_attn)
            hooks.append(Hook(block.get_submodule(path) if path else block, call, entry=False))
    return hooks


@contextmanager
def registered(hooks: Sequence[Hook]) -> Generator[None]:
    """The hooks on their modules; they are gone when the block is left, however it is left.

    Torch registers hooks without a lock: two threads could draw the same id, and one hook would replace the other.
    """
    handles: list[Any] = []
    try:
        with _REGISTERING:
            for hook in hooks:
                if hook.entry:
                    handles.append(hook.module.register_forward_pre_hook(hook.call, with_kwargs=True))
                else:
                    handles.append(hook.module.register_forward_hook(hook.call))
        yield
    finally:
        with _REGISTERING:
            for handle in handles:
                handle.remove()


def module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A module's first argument, passed by position or by name, and the rest."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {key: value for key, value in kwargs.items() if key != "hidden_states"}


def first(output: Any) -> Tensor:
    """A module's output tensor; some families return tuples."""
    return output[0] if isinstance(output, tuple) else output
