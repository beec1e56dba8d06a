"""The hooks of one pass: what they share, and where each stream of a block is caught.

One hook per module side edits and then reads every site there, because hooks of one module run in the order of their
registration. A hook acts only on the thread that started the pass.
"""

import threading
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from subspace_probe.core.edits import EditContext, EditMap
from subspace_probe.core.errors import ShapeError, UnsupportedSite
from subspace_probe.core.sites import Site, Stream
from subspace_probe.core.tokens import Where
from subspace_probe.linalg.finite import all_finite
from subspace_probe.models.layouts import Layout

_REGISTERING = threading.Lock()

NO_PATTERN = (
    "The attention pattern of layer {layer} was asked for, but this attention implementation never forms it. "
    "Load with attn_implementation='eager'."
)


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
    dtype: torch.dtype | None = None
    needed: frozenset[Site] = frozenset()
    thread: int = field(default_factory=threading.get_ident)
    pre: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    captured: dict[Site, Tensor] = field(default_factory=dict[Site, Tensor])
    fired: set[Site] = field(default_factory=set[Site])
    _memory: dict[Any, Any] = field(default_factory=dict[Any, Any])
    _editing: bool = False
    _where: Where | None = None
    _contexts: dict[torch.device, EditContext] = field(default_factory=dict[torch.device, EditContext])
    _kept: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict[torch.device, Any])

    @property
    def mine(self) -> bool:
        """Whether what passes now is this pass's: not another thread's, and not that of a pass inside an edit."""
        return threading.get_ident() == self.thread and not self._editing

    @property
    def sites(self) -> set[Site]:
        """Every site the pass has to see."""
        return {*self.reads, *self.writes, *self.needed} | ({self.stop_after} if self.stop_after else set())

    def enter(self, ctx: EditContext, where: Where | None = None) -> None:
        """Begin a forward pass over these tokens; of reads, keep those at `where`."""
        device = ctx.positions.device
        ctx = replace(ctx, reads={}, memory=self._memory)  # one memory for all steps of a generation
        self._where, self._contexts, self._kept = where, {device: ctx}, {}
        if where is not None:
            self._kept[device] = tuple(ctx.select(where).nonzero(as_tuple=True))  # pyright: ignore[reportArgumentType]

    def visit(self, layer: int, stream: Stream, x: Tensor) -> Tensor:
        """Edit, then read, every site of one stream of one block."""
        needed = [site for site in self.needed if (site.layer, site.stream) == (layer, stream)]
        self._show(needed, x)
        for site in [site for site in self.writes if (site.layer, site.stream) == (layer, stream)]:
            x = self._edited(site, x)
            self.fired.add(site)
        self._show(needed, x)
        for site in self.reads:
            if site.layer == layer and site.stream == stream:
                self.captured[site] = self._read(site, x)
                self.fired.add(site)
        if self.stop_after is not None and (layer, stream) == (self.stop_after.layer, self.stop_after.stream):
            self.fired.add(self.stop_after)
            raise Stop
        return x

    def _show(self, needed: Collection[Site], x: Tensor) -> None:
        """Let later edits, and those of this very site, see these states."""
        for site in needed:
            reads: Any = next(iter(self._contexts.values())).reads  # one mapping, shared by the contexts of all devices
            reads[site] = self._head(site, x).detach()
            self.fired.add(site)

    def _head(self, site: Site, x: Tensor) -> Tensor:
        """One head's part of `z`; the whole of everything else."""
        return x if site.head is None else x.unflatten(-1, (self.n_heads, -1))[..., site.head, :]

    def _read(self, site: Site, x: Tensor) -> Tensor:
        pattern = site.stream == "pattern" and site.head is not None
        value = x[:, site.head] if pattern else self._head(site, x)
        if self._where is not None:
            if x.device not in self._kept:  # layers may be spread over devices
                rows, columns = next(iter(self._kept.values()))
                self._kept[x.device] = rows.to(x.device), columns.to(x.device)
            value = value[self._kept[x.device]]
        value = value if self.grad else value.detach()
        return value if self.dtype is None else value.to(self.dtype)

    def _edited(self, site: Site, x: Tensor) -> Tensor:
        if x.device not in self._contexts:
            self._contexts[x.device] = next(iter(self._contexts.values())).to(x.device)
        self._editing = True
        try:
            if site.head is None:
                return self._checked(site, x, self.writes[site](x, self._contexts[x.device]))
            heads = list(x.unflatten(-1, (self.n_heads, -1)).unbind(-2))
            edited = self.writes[site](heads[site.head], self._contexts[x.device])
            heads[site.head] = self._checked(site, heads[site.head], edited)
            return torch.stack(heads, dim=-2).flatten(-2)
        finally:
            self._editing = False

    def _checked(self, site: Site, x: Tensor, edited: Tensor) -> Tensor:
        if not isinstance(edited, Tensor):
            raise ShapeError(f"The edit at {site.short} returned {type(edited).__name__}. An edit returns a tensor.")
        if edited.shape != x.shape:
            raise ShapeError(
                f"The edit at {site.short} returned shape {tuple(edited.shape)} for activations of shape "
                f"{tuple(x.shape)}. An edit returns the shape it was given."
            )
        if not all_finite(edited) and all_finite(x):
            rows = (~edited.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
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
    changed_later: bool = False

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
        if self.changed_later:
            x = x.clone()  # the block adds to this tensor in place, and what was read must stay as it was
        return (x, *output[1:]) if isinstance(output, tuple) else x


@final
@dataclass(frozen=True, eq=False)
class _Patterns:
    """Reads attention patterns, which attention returns beside its output."""

    state: Pass
    layer: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.state.mine:
            if not isinstance(output, tuple) or output[1] is None:
                raise UnsupportedSite(NO_PATTERN.format(layer=self.layer))
            self.state.visit(self.layer, "pattern", output[1])


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
    """The hooks that one block needs for the given streams, in the order in which they fire."""
    through_attn = "resid_mid" in streams and not layout.post_norm
    # one hook a module: attn_out and a resid_mid written through it are visited by the same one
    attn: list[Stream] = ["attn_out"] if "attn_out" in streams else []
    if through_attn:
        attn.append("resid_mid")

    def entering(path: str, stream: Stream, *, keep: bool = False) -> list[Hook]:
        call = _Entering(state, layer, stream, keep)
        return [Hook(block.get_submodule(path), call, entry=True)] if stream in streams or keep else []

    def leaving(path: str, names: Sequence[Stream]) -> list[Hook]:
        call = _Leaving(state, layer, tuple(names), through_attn, layout.in_place and "mlp_out" in names)
        return [Hook(block.get_submodule(path), call, entry=False)] if names else []

    def only(*names: Stream) -> list[Stream]:
        return [name for name in names if name in streams]

    pattern = [Hook(block.get_submodule(layout.attention), _Patterns(state, layer), entry=False)] * len(only("pattern"))
    return [
        *entering("", "resid_pre", keep=through_attn),
        *(pattern if not layout.projects_inside else []),
        *entering(layout.z, "z"),
        *(leaving(layout.attn, attn) if layout.adds_inside else []),
        *(pattern if layout.projects_inside else []),
        *(leaving(layout.attn, attn) if not layout.adds_inside else []),
        *leaving(layout.resid_mid, [] if through_attn else only("resid_mid")),
        *entering(layout.mlp_post, "mlp_post"),
        *leaving(layout.mlp, only("mlp_out")),
        *leaving("", only("resid_post")),
    ]


def hook_blocks(blocks: Sequence[nn.Module], layout: Layout, state: Pass) -> list[Hook]:
    """The hooks that a pass needs, in the order in which they fire."""
    hooks: list[Hook] = []
    for layer in sorted({site.layer for site in state.sites}):
        streams: set[Stream] = {site.stream for site in state.sites if site.layer == layer}
        hooks += hook_block(blocks[layer], layout, layer, streams, state)
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
