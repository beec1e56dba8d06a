"""nnsight: the same sites through its traces, a second stack to hold the native backend's hooks against.

A pass is one nnsight trace, whose body asks for module inputs and outputs in the order in which the model reaches them.
Where this differs from nnsight used plainly:

* nnsight replaces `forward` on every module for good. Here only the modules of a pass's sites are replaced, and only
  while the pass runs. The tokenizer is never touched.
* nnsight is not made for threads, nor for passes inside passes. Here every pass has its own interleaver, which modules
  answer only in the thread that runs it, and not within its edits: what an edit runs is the bare model.
* Importing nnsight gives every Python object a `save` method and replaces `torch.Tensor.backward`. Both are undone,
  unless nnsight was imported before this module. A later `import nnsight` brings them back, as it would have done.
  What stays is in C: glibc's `backtrace()` returns nothing, without which torch errors inside edits crash the process.

Values are seen inside the user's own forward hooks, so edits of those to a module's output are not in reads of it.
"""

import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, final
from warnings import catch_warnings, simplefilter

import torch
from torch import nn

from subspace_probe.models.backend import Backend, Output
from subspace_probe.models.hooks import Hook, Pass, Stop, hook_blocks


@final
class _Later(MetaPathFinder, Loader):
    """Gives whoever imports nnsight after us what that import promises: the patches that were undone here."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == self.module.__name__ else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__spec__ = self.spec
        if module._c.mount is not None and module.CONFIG.APP.PYMOUNT:
            module._c.mount(module.save, "save")
        module.intervention.backward.install()


@contextmanager
def _unpatched() -> Generator[None]:
    """Undo what the first import of nnsight does to Python's objects and to torch."""
    if "nnsight" in sys.modules:
        yield
        return
    backward = torch.Tensor.backward
    yield
    module = sys.modules.pop("nnsight")
    torch.Tensor.backward = backward
    if "save" in vars(object):
        module._c.unmount("save")
    sys.meta_path.insert(0, _Later(module))


with _unpatched():
    from nnsight import NNsight
    from nnsight.intervention.envoy import Envoy
    from nnsight.intervention.interleaver import EarlyStopException, Interleaver, OutOfOrderError
    from nnsight.intervention.source import STATE, install_controller

_NOW = threading.local()
_CONTROLLING = threading.Lock()
_FORWARDS: dict[nn.Module, Any] = {}
"""What the modules that passes have replaced `forward` on had there before; None where it was their class's."""


@final
class _Interleaver(Interleaver):
    """Runs where its pass does: in one thread, outside its edits, and not while a pass inside it runs."""

    _around: Any = None

    @property
    def interleaving(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(_NOW, "running", None) is self

    @interleaving.setter
    def interleaving(self, on: bool) -> None:
        if on:
            self._around, _NOW.running = getattr(_NOW, "running", None), self
        elif self.interleaving:
            _NOW.running = self._around

    def instrument(self, envoy: Envoy) -> None:
        """Nothing yet: envoys are built once, and modules are replaced within a pass."""

    def apart(self, hook: Hook, *seen: Any) -> Any:
        """What a hook makes of what it sees, with every module running as if there were no pass."""
        self.interleaving = False
        try:
            return hook.call(hook.module, *seen)
        except Stop:
            raise EarlyStopException from None
        finally:
            self.interleaving = True


@contextmanager
def _controlled(envoys: Sequence[Any], interleaver: _Interleaver) -> Generator[None]:
    """Modules that answer this interleaver; those that no other pass needs are as they were when the block is left."""
    try:
        with _CONTROLLING:
            for envoy in envoys:
                inside = vars(envoy._module)
                if STATE not in inside:  # else another pass runs, or the user has wrapped the model too
                    _FORWARDS[envoy._module] = inside.get("forward")
                own = envoy._shallow_copy()
                own.interleaver = interleaver
                install_controller(own)
        yield
    finally:
        with _CONTROLLING:
            for module in {envoy._module for envoy in envoys}:
                inside = vars(module)
                if state := inside.get(STATE):
                    state.routes = [route for route in state.routes if route[0]() not in (None, interleaver)]
                if module in _FORWARDS and not (state and state.routes):
                    before = _FORWARDS.pop(module)
                    inside.pop(STATE, None)
                    inside.pop("forward", None)
                    if before is not None:
                        inside["forward"] = before


@final
class NNsightModel(Backend):
    """nnsight over one Hugging Face model, whose weights are shared, not copied."""

    def _prepare(self) -> None:
        with catch_warnings():
            simplefilter("ignore")  # a submodule called `output` gets another name; none is asked for by name here
            self._root: Any = NNsight(self.hf, interleaver=_Interleaver())
        self._envoys: dict[nn.Module, Any] = {envoy._module: envoy for envoy in self._root.modules()}

    def _envoy(self, module: nn.Module) -> Any:
        """The module's envoy; modules may have come after the model was loaded, as adapters do."""
        if module not in self._envoys:
            self._envoys[module] = Envoy(module, f"later.{id(module)}", _Interleaver())
        return self._envoys[module]

    def _call(self, state: Pass, inputs: dict[str, Any]) -> Output | None:
        hooks = hook_blocks(self.blocks, self.layout, state)
        envoys = [self._envoy(hook.module) for hook in hooks]
        out: list[Any] = []
        root, interleaver = self._root._shallow_copy(), _Interleaver()
        root.interleaver = interleaver
        with _controlled(envoys, interleaver):
            try:
                # a function of nothing: inputs given to nnsight are moved to the first weight's device
                with root.trace(state, fn=lambda _: out.append(self.hf(**inputs))):
                    for hook, envoy in zip(hooks, envoys, strict=True):
                        seen = envoy.inputs if hook.entry else ((), envoy.output)
                        made = interleaver.apart(hook, *seen)
                        if made is not None:
                            setattr(envoy, "inputs" if hook.entry else "output", made)
            except OutOfOrderError:
                pass  # a module never ran, so its site did not fire: the base class says so for every backend
        return Output(getattr(out[0], "logits", None), getattr(out[0], "past_key_values", None)) if out else None
