"""What nnsight adds to the contract of backends: what it must not leave behind, in modules, in Python and in torch."""

import copy
import gc
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny import LAYERS, batch, tiny

if TYPE_CHECKING:
    from subspace_probe.core.sites import Site, Stream
    from subspace_probe.models.nns import NNsightModel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent


def wrapped(variant: str = "llama", hf: Any = None) -> "NNsightModel":
    from subspace_probe.models.nns import NNsightModel

    return NNsightModel(tiny(variant) if hf is None else hf, name=variant)


def site(layer: int, stream: "Stream" = "resid_post") -> "Site":
    from subspace_probe.core.sites import Site

    return Site(layer, stream)


def insides(hf: Any) -> dict[str, list[str]]:
    """The names that every module's own dictionary holds; nnsight puts `forward` and `__nnsight__` there for good."""
    return {name: list(vars(module)) for name, module in hf.named_modules()}


def add(size: float) -> Any:
    return lambda x, ctx: x + size


# --------------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("variant", ["gpt2", "llama", "qwen3_moe", "gemma2", "bloom", "bert"])
def test_reads_and_writes_are_exactly_those_of_native_hooks(variant: str) -> None:
    from subspace_probe.core.sites import FORWARD_ORDER, READ_ONLY
    from subspace_probe.models.native import NativeModel

    hf, shown = tiny(variant, attn_implementation="eager"), batch(9, 6, 3)
    native, other = NativeModel(hf, name=variant), wrapped(hf=hf)
    streams = [stream for stream in FORWARD_ORDER if stream not in native.spec.unsupported]
    sites = [site(layer, stream) for layer in range(LAYERS) for stream in streams]
    assert "pattern" in streams
    written = [s for s in sites if s.stream not in READ_ONLY]
    for writes in ({}, *({s: add(0.3)} for s in written), {s: add(0.1) for s in written}):
        wanted, found = (model.run(shown, reads=sites, writes=writes) for model in (native, other))
        assert all(torch.equal(found.reads[s], wanted.reads[s]) for s in sites), str(writes)
        assert wanted.logits is None if native.spec.encoder else torch.equal(found.logits, wanted.logits)


def test_half_precision_is_that_of_native_hooks() -> None:
    from subspace_probe.models.native import NativeModel

    hf, shown = copy.deepcopy(tiny("llama")).to(torch.bfloat16), batch(9, 5)
    wanted, found = (m.run(shown, reads=[site(2)]) for m in (NativeModel(hf, name="half"), wrapped(hf=hf)))
    assert found.reads[site(2)].dtype == torch.bfloat16
    assert torch.equal(found.reads[site(2)], wanted.reads[site(2)])
    assert torch.equal(found.logits, wanted.logits)


# ------------------------------------------------------------------------------------------------- the user's own model
def test_a_pass_leaves_the_modules_as_they_were() -> None:
    hf = copy.deepcopy(tiny("llama"))
    before, keys = insides(hf), list(hf.state_dict())
    model = wrapped(hf=hf)
    during: list[dict[str, list[str]]] = []

    def look(x: Tensor, ctx: Any) -> Tensor:
        during.append(insides(hf))
        return x

    def fail(x: Tensor, ctx: Any) -> Tensor:
        raise KeyboardInterrupt

    model.run(batch(4), writes={site(1): look})
    # the edited block alone is replaced, and the check sees it
    assert {name for name in before if during[0][name] != before[name]} == {"model.layers.1"}
    assert (insides(hf), list(hf.state_dict())) == (before, keys)
    with pytest.raises(KeyboardInterrupt):
        model.run(batch(4), reads=[site(0)], writes={site(1): fail})
    model.run(batch(4), reads=[site(2)], stop_after=site(2))
    model.generate(batch(4), writes={site(1): add(1.0)}, max_new_tokens=2)
    assert (insides(hf), list(hf.state_dict())) == (before, keys)
    pristine = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        assert torch.equal(hf(batch(4).ids).logits, pristine(batch(4).ids).logits)


def test_a_forward_of_the_modules_own_runs_within_the_pass_and_is_there_again_behind_it() -> None:
    hf = copy.deepcopy(tiny("llama"))
    model, block = wrapped(hf=hf), hf.model.layers[1]
    plain = model.run(batch(4), reads=[site(1)]).reads[site(1)]
    block.forward = types.MethodType(lambda self, *args, **kwargs: 2 * type(self).forward(self, *args, **kwargs), block)
    own = block.forward
    assert torch.equal(model.run(batch(4), reads=[site(1)]).reads[site(1)], 2 * plain)
    assert block.forward is own


def test_a_model_that_accelerate_has_hooked_runs() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hf = copy.deepcopy(tiny("llama"))
    wanted = wrapped(hf=hf).run(batch(4), writes={site(1): add(0.5)}).logits
    add_hook_to_module(hf, AlignDevicesHook("cpu", io_same_device=True), append=True)
    for module in hf.model.layers:
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    before = insides(hf)
    assert torch.equal(wrapped(hf=hf).run(batch(4), writes={site(1): add(0.5)}).logits, wanted)
    assert insides(hf) == before


def test_modules_that_came_after_loading_are_seen_and_those_that_went_are_missed() -> None:
    from subspace_probe.core.errors import SiteError

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1

    hf = copy.deepcopy(tiny("llama"))
    model = wrapped(hf=hf)
    plain = model.run(batch(4), reads=[site(0, "mlp_out")]).reads[site(0, "mlp_out")]
    hf.model.layers[0].mlp = Adapted(hf.model.layers[0].mlp)
    assert torch.equal(model.run(batch(4), reads=[site(0, "mlp_out")]).reads[site(0, "mlp_out")], plain + 1)
    hf.model.layers[1] = nn.Module()
    hf.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(SiteError, match=r"L1\.resid_post.*skipped their block"):
        model.run(batch(4), reads=[site(1), site(2)])
    with pytest.raises(SiteError, match=r"L1\.resid_post.*skipped their block"):
        model.generate(batch(4), reads=[site(1)], max_new_tokens=2)


def test_a_stopped_pass_computes_nothing_behind_its_site() -> None:
    hf = copy.deepcopy(tiny("llama"))
    model, ran = wrapped(hf=hf), list[str]()
    names = ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp", "model.layers.2", "lm_head"]
    for name in names:
        hf.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: ran.append(name))
    model.run(batch(4), stop_after=site(1, "z"))
    assert ran == []
    model.run(batch(4), stop_after=site(1, "attn_out"))
    assert ran == names[:1]
    model.run(batch(4), stop_after=site(1))
    assert ran == [*names[:1], *names[:2]]


# ----------------------------------------------------------------------------------------------------- passes in passes
def test_an_edit_may_run_the_model_and_another_pass() -> None:
    model, shown, other = wrapped(), batch(6, 3), batch(4)
    edits = {site(0): add(1.0), site(1): add(0.5)}
    wanted = model.run(shown, reads=[site(2)], writes=edits)
    inner = model.run(other, reads=[site(2)], writes={site(1): add(-1.0)}).reads[site(2)]
    with torch.no_grad():
        bare = model.hf(other.ids).logits
    seen: list[Tensor] = []

    def nested(x: Tensor, ctx: Any) -> Tensor:
        seen.append(model.run(other, reads=[site(2)], writes={site(1): add(-1.0)}).reads[site(2)])
        seen.append(model.hf(other.ids).logits)
        return x + 1.0

    found = model.run(shown, reads=[site(2)], writes={**edits, site(0): nested})
    assert torch.equal(seen[0], inner)
    assert torch.equal(seen[1], bare)
    assert torch.equal(found.reads[site(2)], wanted.reads[site(2)])
    assert torch.equal(found.logits, wanted.logits)


def test_a_users_hook_may_run_another_pass() -> None:
    hf = copy.deepcopy(tiny("llama"))
    model, shown, seen = wrapped(hf=hf), batch(6, 3), list[Tensor]()
    wanted = model.run(shown, reads=[site(0), site(2)], writes={site(1): add(0.5)})

    def nested(module: nn.Module, args: Any, output: Tensor) -> None:
        handle.remove()
        seen.append(model.run(shown, reads=[site(2)]).reads[site(2)])

    handle = hf.model.layers[0].register_forward_hook(nested)
    found = model.run(shown, reads=[site(0), site(2)], writes={site(1): add(0.5)})
    assert torch.equal(seen[0], model.run(shown, reads=[site(2)]).reads[site(2)])
    assert torch.equal(found.reads[site(2)], wanted.reads[site(2)])


def test_many_threads_get_their_own_answers_and_leave_nothing() -> None:
    hf = copy.deepcopy(tiny("llama"))
    before, model = insides(hf), wrapped(hf=hf)
    jobs = [
        (batch(5 + job, 3, seed=job), {site(job % 3, "z" if job % 2 else "resid_post"): add(job)}) for job in range(4)
    ]
    alone = [model.run(shown, writes=writes).logits for shown, writes in jobs]
    right: list[bool] = []

    def work(job: int) -> None:
        shown, writes = jobs[job]
        right.extend(torch.equal(model.run(shown, writes=writes).logits, alone[job]) for _ in range(15))

    threads = [threading.Thread(target=work, args=(job,)) for job in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 60
    assert insides(hf) == before


# --------------------------------------------------------------------------------------------------------------- errors
def test_errors_of_torch_inside_an_edit_arrive_as_they_are() -> None:
    """In a greenlet, a C++ error that walks the stack would end the process, but for nnsight's guard."""
    model, shown = wrapped(), batch(6, 3)
    plain = model.run(shown).logits
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        model.run(shown, writes={site(1): lambda x, ctx: x @ torch.zeros(3, 3)})
    assert Path(__file__).name in {Path(entry.path).name for entry in caught.traceback}
    error = ValueError("mine")

    def fail(x: Tensor, ctx: Any) -> Tensor:
        raise error

    with pytest.raises(ValueError, match="mine") as raised:
        model.run(shown, reads=[site(0)], writes={site(1): fail})
    assert raised.value is error
    assert torch.equal(model.run(shown).logits, plain)


def test_a_pass_lets_go_of_its_tensors() -> None:
    model = wrapped()
    gc.collect()
    gc.disable()
    try:
        run = model.run(batch(4), reads=[site(1)], writes={site(0): add(1.0)}, grad=True)
        held = [weakref.ref(run.reads[site(1)]), weakref.ref(run.logits)]
        del run
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


# -------------------------------------------------------------------------------------------------------------- patches
PATCHES = """
import torch
from tests.models.tiny import batch, tiny
{first}
backward = torch.Tensor.backward
{before}
from subspace_probe.core.sites import Site
from subspace_probe.models.nns import NNsightModel
model = NNsightModel(tiny("llama"), name="llama")

def run():
    def fail(x, ctx):
        raise ValueError("mine")
    logits = model.run(batch(4), reads=[Site(1)], writes={{Site(0): lambda x, ctx: x + 1}}).logits
    try:
        model.run(batch(4), writes={{Site(0): fail}})
    except ValueError:
        return logits

logits = run()
{after}
"""

MINE = """
import nnsight
user = nnsight.NNsight(tiny("llama"))
def mine():
    with user.trace(input_ids=batch(4).ids, use_cache=False):
        by_method = user.model.layers[1].output.save()
        by_function = nnsight.save(user.model.layers[1].output)
        with user.output.logits.sum().backward():
            slope = by_method.grad.save()
    return by_method, by_function, slope
"""

SAME = """
by_method, by_function, slope = mine()
assert by_method is by_function and slope.shape == by_method.shape and slope.norm() > 0
assert torch.equal(run(), logits)
assert torch.equal(mine()[2], slope)
"""


def passes(tmp_path: Path, **parts: str) -> None:
    """Run a program in a fresh interpreter; nnsight reads its source, so it is a file."""
    program = tmp_path / "program.py"
    program.write_text(PATCHES.format(**{"first": "", "before": "", "after": ""} | parts))
    command = [sys.executable, "-W", "error", str(program)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_python_and_torch_are_unpatched_until_the_user_imports_nnsight_who_then_gets_all_of_it(tmp_path: Path) -> None:
    before = """
import sys, warnings
batch(4), tiny("llama")
filters, names = list(warnings.filters), {*vars(object)}
"""
    after = """
assert not hasattr(1, "save") and {*vars(object)} == names and warnings.filters == filters
assert torch.Tensor.backward is backward and sys.gettrace() is None and "nnsight" not in sys.modules
import nnsight.intervention.tracer
assert hasattr(1, "save") and torch.Tensor.backward is not backward
assert nnsight.intervention.envoy.Envoy and nnsight.__spec__.origin
assert not any(type(finder).__module__.startswith("subspace_probe") for finder in sys.meta_path)
"""
    passes(tmp_path, before=before, after=after + MINE + SAME)


@pytest.mark.slow
def test_who_imported_nnsight_first_keeps_all_of_it(tmp_path: Path) -> None:
    kept = "assert hasattr(1, 'save') and torch.Tensor.backward is backward\n"
    kept += "assert '__nnsight__' in vars(tiny('llama').model.layers[1])\n"
    passes(tmp_path, first=MINE, after=SAME + kept)
