"""The hooks of one pass: what they share, and where each stream of a block is caught.

One hook per module side edits and then reads every site there, because hooks of one module run in the order of their
registration. A hook acts only on the thread that started the pass.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from subspace_probe.core.edits import EditContext, EditMap
from subspace_probe.core.errors import ShapeError
from subspace_probe.core.sites import FORWARD_ORDER, Site, Stream
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


def hook_block(block: nn.Module, layout: Layout, layer: int, streams: set[Stream], state: Pass) -> list[Hook]:
    """The hooks that one block needs for the given streams."""
    hooks = list[Hook]()
    through_attn = "resid_mid" in streams and not layout.post_norm

    def entering(stream: Stream) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if kwargs is None or not state.mine:
                return None
            x, rest, named = module_input(args, kwargs)
            x = state.visit(layer, stream, x)
            if stream == "resid_pre" and through_attn:
                state.pre[layer] = x
            return (x, *rest), named

        return hook

    def leaving(*visited: Stream) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not state.mine:
                return None
            x = first(output)
            for stream in visited:
                if stream == "resid_mid" and through_attn:
                    mid = state.pre.pop(layer) + x
                    # adding the difference moves the stream itself, which the second norm's input would not
                    x = x + (state.visit(layer, "resid_mid", mid) - mid)
                else:
                    x = state.visit(layer, stream, x)
            return _with_first(output, x)

        return hook

    def watch(path: str, call: Callable[..., Any], entry: bool) -> None:
        hooks.append(Hook(block.get_submodule(path) if path else block, call, entry))

    for stream in [s for s in FORWARD_ORDER if s in streams or (s == "resid_pre" and through_attn)]:
        if stream == "resid_pre":
            watch("", entering("resid_pre"), True)
        elif stream == "z":
            watch(layout.z, entering("z"), True)
        elif stream == "mlp_post":
            watch(layout.mlp_post, entering("mlp_post"), True)
        elif stream == "attn_out":
            # one hook for both: hooks of one module run in the order of registration
            watch(layout.attn, leaving(*(("attn_out", "resid_mid") if through_attn else ("attn_out",))), False)
        elif stream == "resid_mid" and not through_attn:
            watch(layout.resid_mid, leaving("resid_mid"), False)
        elif stream == "resid_mid" and "attn_out" not in streams:
            watch(layout.attn, leaving("resid_mid"), False)
        elif stream == "mlp_out":
            watch(layout.mlp, leaving("mlp_out"), False)
        elif stream == "resid_post":
            watch("", leaving("resid_post"), False)
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


def _with_first(output: Any, x: Tensor) -> Any:
    return (x, *output[1:]) if isinstance(output, tuple) else x
