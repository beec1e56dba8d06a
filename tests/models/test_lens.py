"""The TransformerLens backend beside the native one: the user's model untouched, bridges kept apart.

What it shares with every backend, and that it agrees with native, is in tests/contracts. Runs on TransformerLens 3.9
and, by `make test-tl4`, on 4.
"""

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import LAYERS, VOCAB, batch, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.edits import Edit
    from subspace_probe.core.sites import Site
    from subspace_probe.models.backend import Backend
    from subspace_probe.models.lens import LensModel
    from subspace_probe.models.native import NativeModel

pytestmark = pytest.mark.slow

CLOSE = 1e-5  # times the largest value: two implementations in float32


@cache
def lens(variant: str) -> "LensModel":
    from subspace_probe.models.lens import LensModel

    return LensModel(tiny(variant), name=variant)


@cache
def native(variant: str) -> "NativeModel":
    """Beside a bridge: attention is eager in both, so that patterns can be read."""
    from subspace_probe.models.native import NativeModel

    return NativeModel(tiny(variant, attn_implementation="eager"), name=variant)


def sites(model: "Backend", *, patterns: bool) -> "list[Site]":
    from subspace_probe.core.sites import FORWARD_ORDER, READ_ONLY, Site

    left_out = {*model.spec.unsupported} | (set() if patterns else {*READ_ONLY})
    return [Site(layer, stream) for layer in range(LAYERS) for stream in FORWARD_ORDER if stream not in left_out]


def shift(width: int, seed: int = 0) -> "Edit":
    from subspace_probe.core.edits import At
    from subspace_probe.core.tokens import ALL

    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return At(ALL, lambda x, rows: x + vector.to(x))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def bridges(model: "LensModel") -> list[Any]:
    return [idle.bridge for idle in model._idle]


def hooks(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    """TransformerLens has hooks of its own on some modules, which are there from the first pass on."""
    before = {variant: hooks(bridges(lens(variant))[0]) for variant in ("llama", "falcon")}
    yield
    for variant, count in before.items():
        assert {hooks(bridge) for bridge in bridges(lens(variant))} == {count}, variant
        assert hooks(tiny(variant)) == 0


# --------------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2"])
def test_half_precision_is_the_native_backends_within_its_rounding(variant: str) -> None:
    from subspace_probe.models.lens import LensModel
    from subspace_probe.models.native import NativeModel

    hf, shown = tiny(variant, attn_implementation="eager", dtype=torch.bfloat16), batch(9, 5)
    asked = sites(lens(variant), patterns=False)
    found, wanted = (kind(hf, name="half").run(shown, reads=asked) for kind in (LensModel, NativeModel))
    assert {x.dtype for x in (*found.reads.values(), found.logits)} == {torch.bfloat16}
    for site in asked:
        assert distance(found.reads[site][shown.mask].float(), wanted.reads[site][shown.mask].float()) < 5e-2, site


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2", "gptj", "olmo2", "bloom", "falcon"])
def test_sites_are_what_transformer_lens_calls_by_their_names(variant: str) -> None:
    from subspace_probe.models.lens import LensModel

    model = LensModel(tiny(variant), name=variant)  # not shared: run_with_cache leaves hooks of Transformers behind
    shown, asked = batch(9), sites(model, patterns=True)
    reads = model.run(shown, reads=asked).reads
    with torch.no_grad():
        _, cached = bridges(model)[0].run_with_cache(shown.ids, attention_mask=shown.mask.long())
    for site in asked:
        theirs = cached[str(site)]
        assert distance(theirs.flatten(2) if site.stream == "z" else theirs, reads[site]) < CLOSE, str(site)


# ---------------------------------------------------------------------------------------------------- the user's model
@pytest.mark.parametrize("variant", ["gpt2", "llama", "phi3", "falcon"])
def test_the_users_model_is_left_as_it_was(variant: str) -> None:
    from subspace_probe.models.hooked import HookedModel
    from subspace_probe.models.lens import LensModel
    from subspace_probe.models.native import NativeModel

    hf, shown = tiny(variant, use_cache=False), batch(7)  # a model that no other test has seen
    modules = {name: (type(module), module.training) for name, module in hf.named_modules()}
    weights = {name: (weight, weight.clone(), weight.requires_grad) for name, weight in hf.named_parameters()}
    config, logits = hf.config.to_dict(), hf(input_ids=shown.ids).logits
    attention = hf.config._attn_implementation
    model = LensModel(hf, name="users")
    model.run(shown, reads=sites(model, patterns=True))
    assert {name: (type(module), module.training) for name, module in hf.named_modules()} == modules
    for name, weight in hf.named_parameters():
        was, value, grad = weights[name]
        assert weight is was
        assert torch.equal(weight, value)
        assert weight.requires_grad == grad
    assert hf.config.to_dict() == config
    assert hf.config._attn_implementation == attention
    assert torch.equal(hf(input_ids=shown.ids).logits, logits)
    assert hooks(hf) == 0
    prints = {HookedModel(kind(hf, name="users"), words()).fingerprint for kind in (LensModel, NativeModel)}
    assert len(prints) == 1


def test_weights_are_shared_with_the_users_model() -> None:
    theirs = {id(weight) for weight in tiny("llama").parameters()}
    (bridge,) = bridges(lens("llama"))
    assert theirs <= {id(weight) for weight in bridge.original_model.parameters()}
    own = [weight for weight in bridge.original_model.parameters() if id(weight) not in theirs]
    assert sum(weight.numel() for weight in own) <= VOCAB  # a bias of zeros for an unembedding that has none


def test_patterns_are_read_whatever_attention_the_users_model_has() -> None:
    from subspace_probe.core.sites import Site

    assert tiny("llama").config._attn_implementation == "sdpa"
    shown, site = batch(6), Site(1, "pattern")
    pattern = lens("llama").run(shown, reads=[site]).reads[site]
    assert pattern.shape == (1, 4, 6, 6)
    assert torch.allclose(pattern.sum(-1), torch.ones(1, 4, 6))


# ------------------------------------------------------------------------------------------------------ hooks, bridges
def test_hooks_of_others_on_a_bridge_stay_and_see_what_is_edited() -> None:
    from subspace_probe.core.sites import Site

    (bridge,), shown = bridges(lens("llama")), batch(6)
    seen: list[Tensor] = []
    point = bridge.hook_dict["blocks.2.hook_resid_pre"]
    point.add_hook(lambda x, hook: seen.append(x.detach()))
    run = lens("llama").run(shown, reads=[Site(1)], writes={Site(1): shift(32)})
    assert torch.equal(seen.pop(), run.reads[Site(1)])
    lens("llama").run(shown, reads=[Site(2)])
    assert len(seen) == 1
    point.remove_hooks()


@pytest.mark.parametrize("variant", ["llama", "falcon"])
def test_a_pass_that_ends_early_or_fails_leaves_no_hook_and_no_trace(variant: str) -> None:
    from subspace_probe.core.sites import Site

    shown, asked = batch(6, 3), sites(lens(variant), patterns=False)
    (bridge,) = bridges(lens(variant))
    count, plain = hooks(bridge), lens(variant).run(shown).logits

    def fail(x: Tensor, ctx: Any) -> Tensor:
        raise KeyboardInterrupt

    for site in asked:
        with pytest.raises(KeyboardInterrupt):
            lens(variant).run(shown, reads=asked, writes={site: fail})
        assert lens(variant).run(shown, stop_after=site).logits is None
        assert torch.equal(lens(variant).run(shown).logits, plain), site.short
    with pytest.raises(KeyboardInterrupt):
        lens(variant).generate(shown, writes={Site(1): fail}, max_new_tokens=2)
    assert bridges(lens(variant)) == [bridge]
    assert hooks(bridge) == count


def test_a_pass_inside_an_edit_has_a_bridge_of_its_own() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.models.lens import LensModel

    model, shown = LensModel(tiny("llama"), name="nested"), batch(6, 3)
    inner: list[Tensor] = []

    def edit(x: Tensor, ctx: Any) -> Tensor:
        inner.append(model.run(shown, reads=[Site(1)], writes={Site(0): shift(32, seed=1)}).reads[Site(1)])
        return shift(32)(x, ctx)

    outer = model.run(shown, reads=[Site(1)], writes={Site(1): edit}).reads[Site(1)]
    assert len(bridges(model)) == 2
    assert torch.equal(outer, model.run(shown, reads=[Site(1)], writes={Site(1): shift(32)}).reads[Site(1)])
    assert torch.equal(inner[0], model.run(shown, reads=[Site(1)], writes={Site(0): shift(32, seed=1)}).reads[Site(1)])
    assert len(bridges(model)) == 2  # they are used again


# -------------------------------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize(
    ("variant", "changed", "reason"),
    [
        ("bert", {}, "BertModel is an encoder"),
        # it splits their fused query, key and value matrices as those of older Falcons
        ("falcon_new", {}, "cannot take this FalconForCausalLM: split_with_sizes"),
        # it does not scale their ALiBi biases
        ("falcon_sequential", {}, r"computes this FalconForCausalLM differently: logits are off by 0\.\d"),
        # without a cache, it leaves the normed queries and keys in float32
        ("olmo2", {"dtype": torch.bfloat16}, "cannot take this Olmo2ForCausalLM: expected"),
    ],
    ids=["bert", "falcon_new", "falcon_sequential", "olmo2"],
)
def test_models_that_transformer_lens_cannot_run_are_refused(
    variant: str, changed: dict[str, Any], reason: str
) -> None:
    from subspace_probe.core.errors import BackendError
    from subspace_probe.models.lens import LensModel

    with pytest.raises(BackendError, match=rf"{reason}.*Use backend='native'\."):
        LensModel(tiny(variant, **changed), name=variant)


def test_a_bridge_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge import sources

    from subspace_probe.core.errors import BackendError
    from subspace_probe.models.lens import LensModel

    build = sources.build_bridge_from_module

    def sloppy(model: Any, *args: Any, **kw: Any) -> Any:
        model.model.layers[1].self_attn.scaling *= 1.01
        return build(model, *args, **kw)

    monkeypatch.setattr(sources, "build_bridge_from_module", sloppy)
    with pytest.raises(BackendError, match="computes this LlamaForCausalLM differently"):
        LensModel(tiny("llama"), name="sloppy")


def test_a_hook_point_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens 3 ignores hooks by unknown names."""
    from subspace_probe.core.errors import BackendError
    from subspace_probe.models import lens as module

    monkeypatch.setattr(module, "_POINTS", {**module._POINTS, "z": "attn.hook_zed"})
    with pytest.raises(BackendError, match=r"no hook point blocks\.0\.attn\.hook_zed in LlamaForCausalLM"):
        module.LensModel(tiny("llama"), name="unknown")


def test_without_transformer_lens_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.core.errors import BackendError
    from subspace_probe.models.lens import LensModel

    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge.sources", None)
    with pytest.raises(BackendError, match=r"pip install 'transformer-lens>=3\.9'"):
        LensModel(tiny("llama"), name="missing")


def test_names_that_transformer_lens_would_look_up_on_the_hub_are_only_names(caplog: pytest.LogCaptureFixture) -> None:
    from subspace_probe.models.lens import LensModel

    assert LensModel(tiny("llama"), name="gptj").spec.name == "gptj"
    assert not caplog.records


@pytest.mark.slow
def test_transformer_lens_is_imported_with_the_first_model_only() -> None:
    code = "import sys, subspace_probe.models.lens; sys.exit('transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
