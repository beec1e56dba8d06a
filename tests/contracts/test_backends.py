"""What every backend promises, on a tiny random model of every family.

Streams are defined by identities, so the checks are about identities, about writes and not only reads, and about what a
pass leaves behind. Beside the checks stand controls: the mistake each of them exists for, made on purpose.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import LAYERS, VARIANTS, VOCAB, batch, tiny

if TYPE_CHECKING:
    from subspace_probe.core.edits import Edit
    from subspace_probe.core.sites import Site, Stream
    from subspace_probe.core.tokens import TokenBatch, Where
    from subspace_probe.models.backend import Backend

ENCODERS = {"bert"}
PARALLEL = {"gpt_neox", "gptj", "falcon", "falcon_new"}
FUSED = {"mixtral", "qwen3_moe"}
# what a backend's library cannot run, or computes differently, and what it is refused with
REFUSED = {
    ("transformer_lens", "bert"): "is an encoder",
    ("transformer_lens", "falcon_new"): "cannot take this FalconForCausalLM",
    ("transformer_lens", "falcon_sequential"): "computes this FalconForCausalLM differently",
}
FAST = {
    "native": {"gpt2", "llama", "gemma2", "qwen3_moe", "gpt_neox", "bloom", "bert"},
    "transformer_lens": {"gpt2", "llama"},
    "nnsight": {"gpt2", "llama"},
}
REFUSED_IN_HALF = {("transformer_lens", "olmo2")}
# backends that run modules of their own on the user's weights: foreign hooks do not fire there, and sums are ordered
# otherwise
TWINS = {"transformer_lens"}
# where each family keeps its output and down projections, written down here a second time and not read from the layouts
PROJECTIONS = {
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "gptj": ("transformer.h.{}.attn.out_proj", "transformer.h.{}.mlp.fc_out"),
    "bloom": ("transformer.h.{}.self_attention.dense", "transformer.h.{}.mlp.dense_4h_to_h"),
    "falcon": ("transformer.h.{}.self_attention.dense", "transformer.h.{}.mlp.dense_4h_to_h"),
    "bert": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
}
LLAMA_LIKE = ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj")


@dataclass(frozen=True)
class Case:
    """One backend over one tiny model."""

    backend: str
    variant: str
    hf: Any
    model: "Backend"

    @property
    def family(self) -> str:
        return VARIANTS[self.variant][0]

    @property
    def runs_the_users_modules(self) -> bool:
        """Whether passes go through the very modules that the user has, with the user's attention implementation."""
        return self.backend not in TWINS

    @property
    def streams(self) -> "tuple[Stream, ...]":
        from subspace_probe.core.sites import FORWARD_ORDER, READ_ONLY

        return tuple(name for name in FORWARD_ORDER if name not in READ_ONLY | {*self.model.spec.unsupported})

    @property
    def sites(self) -> "list[Site]":
        from subspace_probe.core.sites import Site

        return [Site(layer, stream) for layer in range(LAYERS) for stream in self.streams]


@cache
def _case(backend: str, variant: str) -> Case:
    from subspace_probe.models import BACKENDS

    hf = tiny(variant)
    return Case(backend, variant, hf, BACKENDS.load(backend)(hf, name=variant))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from subspace_probe.models import BACKENDS

    for fixture, variants in {"case": list(VARIANTS), "decoder": [v for v in VARIANTS if v not in ENCODERS]}.items():
        if fixture in metafunc.fixturenames:
            pairs = [(backend, variant) for backend in BACKENDS for variant in variants]
            pairs = [pair for pair in pairs if pair not in REFUSED]
            cells = [pytest.param(pair, id="-".join(pair), marks=_marks(*pair)) for pair in pairs]
            metafunc.parametrize(fixture, cells, indirect=True)


def _marks(backend: str, variant: str) -> tuple[pytest.MarkDecorator, ...]:
    """The fast part of the suite takes one family of each kind on native hooks and fewer on the other backends."""
    return () if variant in FAST.get(backend, ()) else (pytest.mark.slow,)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """Every family."""
    return _case(*request.param)


@pytest.fixture
def decoder(request: pytest.FixtureRequest) -> Case:
    """Every family that generates."""
    return _case(*request.param)


# ------------------------------------------------------------------------------------------------------------- measures
def outcome(model: "Backend", shown: "TokenBatch", writes: "Mapping[Site, Edit] | None" = None, **kw: Any) -> Tensor:
    """What a pass ends in: logits, or an encoder's last state."""
    from subspace_probe.core.sites import Site

    last = Site(LAYERS - 1)
    run = model.run(shown, reads=[last], writes=writes or {}, **kw)
    return run.reads[last] if model.spec.encoder else run.logits


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest deviation, in units of the largest value."""
    return float((found.detach() - wanted).abs().max() / wanted.abs().max())


def same(case: Case, found: Tensor, wanted: Tensor) -> bool:
    """Equal, or up to rounding where a backend computes with kernels of its own."""
    return torch.equal(found, wanted) if case.runs_the_users_modules else distance(found, wanted) < CLOSE


def inputs_of(case: Case, shown: "TokenBatch") -> dict[str, Any]:
    """What the Hugging Face model itself is called with."""
    inputs = {"input_ids": shown.ids, "attention_mask": shown.mask.long(), "position_ids": shown.positions}
    return inputs if case.family in ENCODERS else inputs | {"use_cache": False}


def shift(vector: Tensor, where: "Where | None" = None) -> "Edit":
    """Add a vector at some tokens."""
    from subspace_probe.core.edits import At
    from subspace_probe.core.tokens import ALL

    return At(where or ALL, lambda x, rows: x + vector.to(x))


def direction(width: int = 32, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def hooks(model: Any) -> int:
    """Forward hooks on any module of a model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


CLOSE = 1e-5  # batch shape, padding and cache change the order of sums in float32, and nothing else
FAR = 1e-2


# -------------------------------------------------------------------------------------------------------------- streams
def test_every_family_is_tested() -> None:
    from subspace_probe.models.layouts import LAYOUTS

    assert {family for family, _, _ in VARIANTS.values()} == set(LAYOUTS)


def test_streams_obey_the_residual_identities(case: Case) -> None:
    from subspace_probe.core.sites import Site

    reads = case.model.run(batch(11, 7, 4), reads=case.sites).reads

    def at(layer: int, stream: "Stream") -> Tensor:
        return reads[Site(layer, stream)]

    for layer in range(LAYERS):
        pre, attn, mlp, post = (at(layer, s) for s in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        if case.family in ENCODERS:
            block = case.hf.encoder.layer[layer]
            assert distance(block.attention.output.LayerNorm(pre + attn), at(layer, "resid_mid")) < CLOSE
            assert distance(block.output.LayerNorm(at(layer, "resid_mid") + mlp), post) < CLOSE
            assert distance(pre + attn, at(layer, "resid_mid")) > FAR  # an encoder's states are not plain sums
        else:
            assert distance(pre + attn + mlp, post) < CLOSE
            if case.variant not in PARALLEL:
                assert torch.equal(pre + attn, at(layer, "resid_mid"))
        if layer + 1 < LAYERS:
            assert torch.equal(post, at(layer + 1, "resid_pre"))
        assert min(float(x.std()) for x in (attn, mlp)) > 0.01  # no part is so small that leaving it out would pass


def test_reads_are_as_wide_as_announced(case: Case) -> None:
    reads = case.model.run(batch(5), reads=case.sites).reads
    assert {site: x.shape[-1] for site, x in reads.items()} == {site: case.model.width(site) for site in case.sites}


def test_z_and_mlp_post_are_the_inputs_of_the_output_and_down_projections(case: Case) -> None:
    from subspace_probe.core.sites import Site

    shown, seen = batch(9, 5), dict[Any, Tensor]()
    attention, down = PROJECTIONS.get(case.family, LLAMA_LIKE)
    paths = {Site(layer, "z"): attention.format(layer) for layer in range(LAYERS)}
    if case.variant not in FUSED:
        paths |= {Site(layer, "mlp_post"): down.format(layer) for layer in range(LAYERS)}

    def keep(site: "Site") -> Callable[..., None]:
        return lambda module, args: seen.update({site: args[0]})

    handles = [case.hf.get_submodule(path).register_forward_pre_hook(keep(site)) for site, path in paths.items()]
    with torch.no_grad():
        case.hf(**inputs_of(case, shown))
    for handle in handles:
        handle.remove()
    reads = case.model.run(shown, reads=list(paths)).reads
    for site, path in paths.items():
        assert same(case, reads[site][shown.mask], seen[site][shown.mask]), path


def test_attn_out_is_the_projected_z_where_no_norm_stands_between(case: Case) -> None:
    from subspace_probe.core.sites import Site

    if case.family in {"gemma2", "gemma3_text", "olmo2"}:
        return  # what is added to their stream is the output of a norm, which the identities check
    reads = case.model.run(batch(9, 5), reads=[Site(1, "z"), Site(1, "attn_out")]).reads
    project = case.hf.get_submodule(PROJECTIONS.get(case.family, LLAMA_LIKE)[0].format(1))
    assert distance(project(reads[Site(1, "z")]), reads[Site(1, "attn_out")]) < CLOSE


def test_streams_that_a_family_lacks_are_refused_with_the_reason(case: Case) -> None:
    from subspace_probe.core.errors import UnsupportedSite
    from subspace_probe.core.sites import Site

    lacking = {"resid_mid": "in parallel"} if case.variant in PARALLEL else {}
    lacking |= {"mlp_post": "one fused module"} if case.variant in FUSED else {}
    assert set(case.model.spec.unsupported) == set(lacking)
    for stream, reason in lacking.items():
        site = Site(1, stream)
        asked: list[dict[str, Any]] = [{"reads": [site]}, {"writes": {site: shift(direction())}}, {"stop_after": site}]
        for kw in asked:
            with pytest.raises(UnsupportedSite, match=reason):
                case.model.run(batch(4), **kw)


# -------------------------------------------------------------------------------------------------------------- no edit
def test_a_pass_without_edits_is_the_models_own_forward_exactly(case: Case) -> None:
    shown = batch(11, 7, 4)
    with torch.no_grad():
        own = case.hf(**inputs_of(case, shown))
        if case.family in ENCODERS:
            assert torch.equal(outcome(case.model, shown), own.last_hidden_state)
            return
        kept = case.hf(**inputs_of(case, shown), logits_to_keep=2).logits
    plain = case.model.run(shown).logits
    assert same(case, plain[shown.mask], own.logits[shown.mask])
    assert torch.equal(case.model.run(shown, reads=case.sites).logits, plain)
    assert same(case, case.model.run(shown, logits_to_keep=2).logits, kept)


def test_a_row_alone_gives_what_it_gives_in_a_padded_batch(case: Case) -> None:
    shown = batch(11, 7, 4)
    together = case.model.run(shown, reads=case.sites).reads
    for row in range(shown.size):
        single = shown.rows([row])
        assert single.ids.shape[1] == (11, 7, 4)[row]
        for site, alone in case.model.run(single, reads=case.sites).reads.items():
            assert distance(together[site][row, shown.mask[row]], alone[0]) < CLOSE, site.short


def test_padding_on_the_right_changes_nothing_at_real_tokens(case: Case) -> None:
    from subspace_probe.core.sites import Site

    left = batch(9, 6, 3)
    width, lengths = left.ids.shape[1], left.lengths.tolist()
    ids, mask = torch.zeros_like(left.ids), torch.zeros_like(left.mask)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = left.ids[row, width - length :], True
    right = replace(left, ids=ids, mask=mask)
    everywhere = {Site(1): shift(direction())}
    for writes in ({}, everywhere):
        found, wanted = (case.model.run(b, reads=case.sites, writes=writes).reads for b in (right, left))
        assert all(distance(found[site][right.mask], wanted[site][left.mask]) < CLOSE for site in case.sites)


def test_padding_without_position_ids_would_be_wrong() -> None:
    """Control of the check above: what a bare forward does to a left-padded row where positions are learned."""
    shown, model = batch(11, 4), tiny("gpt2")
    with torch.no_grad():
        bare = model(input_ids=shown.ids, attention_mask=shown.mask.long()).logits[1, -4:]
        alone = model(input_ids=shown.ids[1:, -4:]).logits[0]
    assert distance(bare, alone) > FAR


# --------------------------------------------------------------------------------------------------------------- writes
def test_writing_what_was_read_changes_nothing(case: Case) -> None:
    shown = batch(11, 7, 4)
    plain = outcome(case.model, shown)
    for site, value in case.model.run(shown, reads=case.sites).reads.items():
        assert torch.equal(outcome(case.model, shown, {site: lambda x, ctx, value=value: value.clone()}), plain), site


def test_every_write_reaches_the_answer_and_is_read_back(case: Case) -> None:
    shown = batch(11, 7, 4)
    plain, before = outcome(case.model, shown), case.model.run(shown, reads=case.sites).reads
    for site in case.sites:
        vector = direction(case.model.width(site))
        run = case.model.run(shown, reads=[site], writes={site: shift(vector)})
        assert torch.equal(run.reads[site][shown.mask], (before[site] + vector)[shown.mask])
        assert distance(outcome(case.model, shown, {site: shift(vector)})[shown.mask], plain[shown.mask]) > FAR, site


def test_adding_at_attn_out_is_adding_at_resid_mid(decoder: Case) -> None:
    from subspace_probe.core.sites import Site

    if decoder.variant in PARALLEL:
        return  # there is no resid_mid, which is refused (above)
    shown, vector = batch(11, 7, 4), direction()
    for layer in range(LAYERS):
        through_attention, through_stream = (
            outcome(decoder.model, shown, {Site(layer, stream): shift(vector)})[shown.mask]
            for stream in ("attn_out", "resid_mid")
        )
        assert distance(through_stream, through_attention) < CLOSE


def test_editing_the_second_norms_input_is_not_a_write_of_resid_mid() -> None:
    """Control: the hook that looks right reads the same state, and moves only the MLP's branch."""
    from subspace_probe.core.sites import Site

    case, shown, vector = _case("native", "llama"), batch(11, 7, 4), direction()
    norm = case.hf.model.layers[1].post_attention_layernorm
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: (seen.append(args[0]), (args[0] + vector,))[1])
    wrong = case.model.run(shown).logits
    handle.remove()
    assert torch.equal(seen[0], case.model.run(shown, reads=[Site(1, "resid_mid")]).reads[Site(1, "resid_mid")])
    right = outcome(case.model, shown, {Site(1, "resid_mid"): shift(vector)})
    assert distance(wrong[shown.mask], right[shown.mask]) > FAR


def test_writing_behind_a_block_is_writing_before_the_next(case: Case) -> None:
    from subspace_probe.core.sites import Site

    shown, edit = batch(11, 7, 4), shift(direction())
    for layer in range(LAYERS - 1):
        behind = outcome(case.model, shown, {Site(layer, "resid_post"): edit})
        assert torch.equal(behind, outcome(case.model, shown, {Site(layer + 1, "resid_pre"): edit}))


def test_a_heads_write_moves_that_head_only(case: Case) -> None:
    from subspace_probe.core.sites import Site

    shown, d_head, head = batch(11, 7, 4), case.model.spec.d_head, 2
    whole, part = Site(1, "z"), Site(1, "z", head)
    vector = direction(d_head)
    before = case.model.run(shown, reads=[whole, part]).reads
    assert torch.equal(before[part], before[whole][..., head * d_head : (head + 1) * d_head])
    after = case.model.run(shown, reads=[whole], writes={part: shift(vector)}).reads[whole]
    heads = (after - before[whole]).unflatten(-1, (case.model.spec.n_heads, d_head))[shown.mask]
    assert torch.equal(heads[:, [0, 1, 3]], torch.zeros_like(heads[:, [0, 1, 3]]))
    assert torch.allclose(heads[:, head], vector.expand_as(heads[:, head]), atol=1e-5)
    full = torch.zeros(4 * d_head)
    full[head * d_head : (head + 1) * d_head] = vector
    same = outcome(case.model, shown, {whole: shift(full)})
    assert distance(outcome(case.model, shown, {part: shift(vector)})[shown.mask], same[shown.mask]) < CLOSE


def test_edits_of_one_site_under_two_names_both_apply(case: Case) -> None:
    from subspace_probe.core.sites import Site

    shown, a, b = batch(6, 3), direction(seed=1), direction(seed=2)
    both = outcome(case.model, shown, {Site(-2): shift(a), Site(LAYERS - 2): shift(b)})
    assert distance(both, outcome(case.model, shown, {Site(LAYERS - 2): shift(a + b)})) < CLOSE
    assert list(case.model.run(shown, reads=[Site(-1)]).reads) == [Site(-1)]


def test_a_gradient_reaches_the_edit(case: Case) -> None:
    from subspace_probe.core.sites import Site

    model, shown = case.model, batch(9, 5)
    weights = direction(32 if model.spec.encoder else VOCAB, seed=3)

    def value(vector: Tensor, grad: bool, site: "Site") -> Tensor:
        ends = outcome(model, shown, {site: shift(vector)}, grad=grad)
        return (ends[shown.mask] @ weights).double().sum()

    for site in [Site(0), Site(1, "attn_out"), Site(1, "z"), Site(2, "mlp_out")]:
        vector = direction(model.width(site), seed=4, size=0.1).requires_grad_()
        (gradient,) = torch.autograd.grad(value(vector, True, site), vector)
        towards = gradient / gradient.norm()
        up, down = (value(vector.detach() + step * towards, False, site) for step in (3e-3, -3e-3))
        assert float((up - down) / 6e-3) == pytest.approx(float(gradient.norm()), rel=2e-2), site.short
        assert not value(vector, False, site).requires_grad


def test_bad_edits_are_named(case: Case) -> None:
    from subspace_probe.core.errors import ShapeError
    from subspace_probe.core.sites import Site

    with pytest.raises(ShapeError, match=r"edit at L1\.resid_post returned shape \(2, 6, 31\)"):
        case.model.run(batch(6, 3), writes={Site(1): lambda x, ctx: x[..., 1:]})
    with pytest.raises(ShapeError, match=r"non-finite values in rows \[1\]"):
        case.model.run(batch(6, 3), writes={Site(1): lambda x, ctx: x / torch.tensor([1.0, 0.0])[:, None, None]})


# --------------------------------------------------------------------------------------------------- what a pass leaves
def test_a_write_does_not_outlive_its_run(case: Case) -> None:
    shown, count = batch(6, 3), hooks(case.hf)
    before = outcome(case.model, shown)
    outcome(case.model, shown, {site: shift(direction(case.model.width(site))) for site in case.sites})
    assert torch.equal(outcome(case.model, shown), before)
    assert hooks(case.hf) == count


def test_an_exception_leaves_no_hook_and_foreign_hooks_alone(case: Case) -> None:
    from subspace_probe.core.sites import Site

    calls: list[int] = []
    count = hooks(case.hf)
    foreign = case.hf.register_forward_hook(lambda module, args, output: calls.append(1))
    block = case.hf.base_model.get_submodule(case.model.layout.blocks)[1]
    inner = block.register_forward_pre_hook(lambda module, args: calls.append(2))
    assert hooks(case.hf) == count + 2  # the counter sees what is there

    def fail(x: Tensor, ctx: Any) -> Tensor:
        raise KeyboardInterrupt

    for site in case.sites:
        with pytest.raises(KeyboardInterrupt):
            case.model.run(batch(4), reads=case.sites, writes={site: fail})
        assert hooks(case.hf) == count + 2, site.short
    if not case.model.spec.encoder:
        with pytest.raises(KeyboardInterrupt):
            case.model.generate(batch(4), writes={Site(1): fail}, max_new_tokens=2)
        with pytest.raises(KeyboardInterrupt):
            case.model.prefix(batch(4), 2, writes={Site(1): fail})
    assert hooks(case.hf) == count + 2
    calls.clear()
    case.model.run(batch(4), reads=case.sites)
    assert sorted(calls) == ([1, 2] if case.runs_the_users_modules else [])
    foreign.remove()
    inner.remove()


def test_sites_that_never_fire_are_an_error(case: Case) -> None:
    from subspace_probe.core.errors import SiteError
    from subspace_probe.core.sites import Site

    shown = batch(6, 3)
    prefix = case.model.prefix(shown, 2)
    asked: list[dict[str, Any]] = [
        {"reads": [Site(1)], "prefix": prefix},
        {"writes": {Site(0, "attn_out"): shift(direction())}, "prefix": prefix},
        {"stop_after": Site(1), "prefix": prefix},
        {"reads": [Site(2)], "stop_after": Site(1)},
    ]
    for kw in asked:
        with pytest.raises(SiteError, match="never fired"):
            case.model.run(shown, **kw)
    with pytest.raises(SiteError, match="3 layers"):
        case.model.run(shown, reads=[Site(3)])
    with pytest.raises(SiteError, match="heads 0 to 3"):
        case.model.run(shown, reads=[Site(1, "z", 4)])


def test_a_block_that_is_skipped_is_an_error() -> None:
    from subspace_probe.core.errors import SiteError
    from subspace_probe.core.sites import Site
    from subspace_probe.models.native import NativeModel

    hf = copy.deepcopy(tiny("llama"))
    model = NativeModel(hf, name="skipping")
    hf.model.layers[1] = torch.nn.Module()
    hf.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(SiteError, match=r"L1\.resid_post.*skipped their block"):
        model.run(batch(4), reads=[Site(1)])


def test_a_stopped_pass_gives_the_same_reads_and_no_logits(case: Case) -> None:
    from subspace_probe.core.sites import Site

    shown = batch(6, 3)
    whole = case.model.run(shown, reads=case.sites).reads
    for stop in case.sites:
        wanted = [site for site in case.sites if site.order <= stop.order]
        later = {Site(2): shift(direction())} if stop.order < Site(2).order else {}
        run = case.model.run(shown, reads=wanted, writes=later, stop_after=stop)
        assert run.logits is None
        assert list(run.reads) == wanted
        assert all(torch.equal(run.reads[site], whole[site]) for site in wanted)


# --------------------------------------------------------------------------------------------------------------- prefix
# a batch as long as its prompts: nothing but the batch axis may be stacked
@pytest.mark.parametrize("lengths", [(9,), (9, 6, 3), (4, 4, 2, 4)], ids=["one", "ragged", "square"])
def test_continuing_from_a_prefix_is_a_full_run(case: Case, lengths: tuple[int, ...]) -> None:
    from subspace_probe.core.sites import Site

    shown, last = batch(*lengths), Site(LAYERS - 1)
    edit = {last: shift(direction())}
    for layer in range(LAYERS):
        prefix = case.model.prefix(shown, layer)
        whole = case.model.run(shown, reads=[last], writes=edit)
        continued = case.model.run(shown, reads=[last], writes=edit, prefix=prefix)
        assert torch.equal(continued.reads[last], whole.reads[last])
        if not case.model.spec.encoder:
            assert torch.equal(continued.logits, whole.logits)
            kept = case.model.run(shown, writes=edit, prefix=prefix, logits_to_keep=1).logits
            assert distance(kept, whole.logits[:, -1:]) < CLOSE
    assert case.model.prefix(shown, -1).layer == LAYERS - 1


@pytest.mark.parametrize("lengths", [(9,), (9, 6, 3), (4, 4, 2, 4)], ids=["one", "ragged", "square"])
def test_a_stacked_prefix_runs_several_edits_at_once(case: Case, lengths: tuple[int, ...]) -> None:
    from subspace_probe.core.edits import Stacked
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST

    shown, site = batch(*lengths), Site(1)
    edits = [shift(direction(seed=1)), None, shift(direction(seed=2), LAST)]
    for layer in range(2):
        stacked = case.model.prefix(shown, layer).repeat(3)
        together = outcome(case.model, stacked.batch, {site: Stacked(edits, shown)}, prefix=stacked).chunk(3)
        for edit, found in zip(edits, together, strict=True):
            alone = outcome(case.model, shown, {} if edit is None else {site: edit})
            assert distance(found[shown.mask], alone[shown.mask]) < CLOSE
        assert distance(together[2][shown.mask], together[1][shown.mask]) > FAR


def test_edits_below_a_prefix_belong_to_it(case: Case) -> None:
    from subspace_probe.core.errors import SiteError
    from subspace_probe.core.sites import Site

    shown, edit = batch(6, 3), {Site(0): shift(direction())}
    prefix = case.model.prefix(shown, 1, writes=edit)
    assert torch.equal(outcome(case.model, shown, prefix=prefix), outcome(case.model, shown, edit))
    with pytest.raises(SiteError, match=r"L0\.resid_post lie above a prefix of layer 0"):
        case.model.prefix(shown, 0, writes=edit)


# ----------------------------------------------------------------------------------------------------------- generation
def generated(
    model: "Backend", shown: "TokenBatch", read: "Site", writes: "Mapping[Site, Edit]", **kw: Any
) -> tuple[Tensor, list[Tensor]]:
    """Generated ids, and what each step's own pass read."""
    from subspace_probe.core.protocols import Step

    seen: list[Tensor] = []

    def keep(step: Step) -> list[bool]:
        seen.append(step.reads[read])
        return [True] * shown.size

    return model.generate(shown, reads=[read], writes=writes, on_step=keep, **kw).ids, seen


def anchored(vector: Tensor, where: "Where", shown: "TokenBatch") -> "Edit":
    """Add a vector where `shown` means `where`, in a pass for which later tokens belong to the prompt too."""

    def edit(x: Tensor, ctx: Any) -> Tensor:
        return x + (shown.select(where, ctx.positions) & ctx.real)[..., None] * vector

    return edit


def test_prefill_and_decoding_are_one_full_pass(decoder: Case) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, GENERATED, LAST, PROMPT

    shown, read = batch(11, 7, 4), Site(LAYERS - 1)
    head = direction(decoder.model.spec.d_head, seed=7)
    vectors = {Site(0): direction(seed=5), Site(1, "attn_out"): direction(seed=6), Site(1, "z", 1): head}
    for where in (ALL, PROMPT, GENERATED, LAST):
        writes = {site: shift(vector, where) for site, vector in vectors.items()}
        made, seen = generated(decoder.model, shown, read, writes, max_new_tokens=5)
        assert [x.shape[1] for x in seen] == [11, 1, 1, 1, 1]
        ids = torch.cat([shown.ids, made[:, :-1]], dim=1)
        whole = replace(shown, ids=ids, mask=torch.cat([shown.mask, torch.ones(3, 4, dtype=torch.bool)], dim=1))
        writes = {site: anchored(vector, where, shown) for site, vector in vectors.items()}
        full = decoder.model.run(whole, reads=[read], writes=writes)
        assert distance(torch.cat(seen, dim=1)[whole.mask], full.reads[read][whole.mask]) < CLOSE, str(where)
        assert torch.equal(full.logits[:, 10:].argmax(-1), made), str(where)


def test_text_is_the_same_with_and_without_the_cache(decoder: Case) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, GENERATED, LAST, PROMPT

    shown, read = batch(11, 7, 4), Site(1)
    for where in (ALL, PROMPT, GENERATED, LAST):
        writes = {Site(1): shift(direction(size=3.0), where)}
        cached = generated(decoder.model, shown, read, writes, max_new_tokens=8)
        again = generated(decoder.model, shown, read, writes, max_new_tokens=8, use_cache=False)
        assert torch.equal(cached[0], again[0]), str(where)
        for step, (found, wanted) in enumerate(zip(cached[1], again[1], strict=True)):
            real = shown.mask if step == 0 else torch.ones(3, 1, dtype=torch.bool)
            assert distance(found[real], wanted[real]) < CLOSE


def test_an_edit_of_the_last_column_is_not_one_intervention() -> None:
    """Control: without absolute positions, text depends on the cache."""
    from subspace_probe.core.sites import Site

    def last_column(x: Tensor, ctx: Any) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + direction(size=3.0)], dim=1)

    def differs(variant: str) -> bool:
        model = _case("native", variant).model
        with_cache, without = (
            model.generate(batch(11, 7, 4), writes={Site(1): last_column}, max_new_tokens=8, use_cache=on).ids
            for on in (True, False)
        )
        return not torch.equal(with_cache, without)

    assert any(differs(variant) for variant in ("llama", "qwen2", "qwen3", "gpt_neox"))


def test_every_where_edits_other_tokens_of_a_generation() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, GENERATED, LAST, PROMPT

    model, shown = _case("native", "llama").model, batch(11, 7, 4)
    texts = [model.generate(shown, max_new_tokens=8).ids]
    for where in (ALL, PROMPT, GENERATED, LAST):
        texts.append(model.generate(shown, writes={Site(1): shift(direction(size=3.0), where)}, max_new_tokens=8).ids)
    assert len({tuple(ids.flatten().tolist()) for ids in texts}) == 5
    assert torch.equal(texts[0][:, 0], texts[3][:, 0])  # GENERATED leaves the first token alone


def test_rows_stop_at_their_end_token_or_when_told(decoder: Case) -> None:
    from subspace_probe.core.errors import ConfigError

    shown = batch(11, 7, 4)
    free = decoder.model.generate(shown, max_new_tokens=6)
    assert free.lengths.tolist() == [6, 6, 6]
    end = int(free.ids[1, 2])
    first = [(row == end).nonzero().flatten().tolist()[:1] for row in free.ids]
    ends = decoder.hf.generation_config.eos_token_id
    decoder.hf.generation_config.eos_token_id = [end]
    try:
        ended = decoder.model.generate(shown, max_new_tokens=6)
    finally:
        decoder.hf.generation_config.eos_token_id = ends
    assert ended.lengths.tolist() == [at[0] + 1 if at else 6 for at in first]
    for row, length in enumerate(ended.lengths.tolist()):
        assert torch.equal(ended.ids[row, :length], free.ids[row, :length])
    told = decoder.model.generate(shown, max_new_tokens=6, on_step=lambda step: [True, step.index < 1, False])
    assert told.lengths.tolist() == [6, 2, 1]
    with pytest.raises(ConfigError, match="exceed the context of 64"):
        decoder.model.generate(shown, max_new_tokens=54)
    with pytest.raises(ConfigError, match="at least 1"):
        decoder.model.generate(shown, max_new_tokens=0)


def test_an_encoder_neither_generates_nor_unembeds() -> None:
    from subspace_probe.core.errors import ConfigError

    model = _case("native", "bert").model
    with pytest.raises(ConfigError, match="encoder"):
        model.generate(batch(4), max_new_tokens=2)
    with pytest.raises(ConfigError, match="no unembedding"):
        model.unembedding()


def test_the_unembedding_reads_the_final_state(decoder: Case) -> None:
    from subspace_probe.core.sites import Site

    shown, last = batch(6, 3), Site(LAYERS - 1)
    run = decoder.model.run(shown, reads=[last])
    norm = decoder.hf.base_model.get_submodule(decoder.model.layout.norm)
    logits = norm(run.reads[last]) @ decoder.model.unembedding().T
    if (bias := getattr(decoder.hf.get_output_embeddings(), "bias", None)) is not None:
        logits = logits + bias
    cap = getattr(decoder.hf.config, "final_logit_softcapping", None)
    assert distance(torch.tanh(logits / cap) * cap if cap else logits, run.logits) < CLOSE


# -------------------------------------------------------------------------------------------------------------- threads
def _answer_in_a_thread_during(case: Case, shown: "TokenBatch", a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The answers of a pass edited by `a` and of another, edited by `b`, that a second thread runs in its middle."""
    from subspace_probe.core.sites import Site

    inner: list[Tensor] = []
    threads = [threading.Thread(target=lambda: inner.append(outcome(case.model, shown, {Site(1): shift(b)})))]

    def edit(x: Tensor, ctx: Any) -> Tensor:
        while threads:
            thread = threads.pop()
            thread.start()
            thread.join()
        return shift(a)(x, ctx)

    outer = outcome(case.model, shown, {Site(1): edit})
    return outer, inner[0]


def test_a_pass_in_the_middle_of_another_threads_pass_sees_only_its_own_edits(case: Case) -> None:
    from subspace_probe.core.sites import Site

    shown, a, b = batch(9, 5), direction(seed=1), direction(seed=2)
    outer, inner = _answer_in_a_thread_during(case, shown, a, b)
    assert torch.equal(outer, outcome(case.model, shown, {Site(1): shift(a)}))
    assert torch.equal(inner, outcome(case.model, shown, {Site(1): shift(b)}))


def test_without_the_thread_guard_edits_would_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the check above."""
    from subspace_probe.core.sites import Site
    from subspace_probe.models.hooks import Pass

    monkeypatch.setattr(Pass, "mine", True)
    case, shown, a, b = _case("native", "llama"), batch(9, 5), direction(seed=1), direction(seed=2)
    _, inner = _answer_in_a_thread_during(case, shown, a, b)
    assert distance(inner, outcome(case.model, shown, {Site(1): shift(b)})) > FAR


def test_a_hook_that_another_thread_is_removing_does_nothing() -> None:
    """Torch then calls an entry hook without the keyword arguments it was registered for."""
    from subspace_probe.core.edits import EditContext
    from subspace_probe.core.sites import FORWARD_ORDER
    from subspace_probe.models.hooks import Pass, hook_block

    model, shown = _case("native", "llama").model, batch(4)
    state = Pass(frozenset(), {}, 4, None, False)
    state.enter(EditContext(shown, shown.positions, shown.mask))
    entries = [hook for hook in hook_block(model.blocks[1], model.layout, 1, FORWARD_ORDER, state) if hook.entry]
    assert len(entries) == 3
    for hook in entries:
        assert hook.call(hook.module, (torch.zeros(1, 4, 32),)) is None
        assert hook.call(hook.module, (torch.zeros(1, 4, 32),), {}) is not None


def test_two_threads_at_once_get_their_own_answers(case: Case) -> None:
    from subspace_probe.core.sites import Site

    everywhere = {site: shift(direction(case.model.width(site), seed=1)) for site in case.sites}
    somewhere = {Site(1, "z"): shift(direction(case.model.width(Site(1, "z")), seed=2))}
    jobs = {0: (batch(9, 5), everywhere), 1: (batch(7, 6, 2, seed=50), somewhere)}
    alone = {job: outcome(case.model, *jobs[job]) for job in jobs}
    wrong: list[int] = []
    start = threading.Barrier(2)

    def work(job: int) -> None:
        start.wait()
        for _ in range(8):
            try:
                if not torch.equal(outcome(case.model, *jobs[job]), alone[job]):
                    wrong.append(job)
            except Exception:
                wrong.append(job)
                raise

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hooks(case.hf) == 0


# -------------------------------------------------------------------------------------------------------------- loading
def test_half_precision_obeys_the_identities_within_its_rounding(case: Case) -> None:
    from subspace_probe.core.errors import BackendError
    from subspace_probe.core.sites import Site

    half = copy.deepcopy(case.hf).to(torch.bfloat16)
    if (case.backend, case.variant) in REFUSED_IN_HALF:
        with pytest.raises(BackendError, match="cannot take this Olmo2ForCausalLM"):
            type(case.model)(half, name="half")
        return
    model = type(case.model)(half, name="half")
    shown = batch(9, 5)
    reads = model.run(shown, reads=case.sites).reads
    assert {x.dtype for x in reads.values()} == {torch.bfloat16}
    for layer in range(LAYERS):
        pre, attn, mlp, post = (
            reads[Site(layer, stream)].float() for stream in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        if not model.spec.encoder:
            assert distance(pre + attn + mlp, post) < 2 * 2**-8  # each of two sums is rounded to eight bits
    value = reads[Site(1)]
    plain = outcome(model, shown)
    assert torch.equal(outcome(model, shown, {Site(1): lambda x, ctx: value.clone()}), plain)
    # an edit may compute in another precision; the pass goes on in the model's
    assert outcome(model, shown, {Site(1): lambda x, ctx: x.double() + direction()}).dtype == torch.bfloat16


@pytest.mark.parametrize("pair", REFUSED, ids="-".join)
def test_what_a_backend_cannot_run_is_refused_on_load(pair: tuple[str, str]) -> None:
    from subspace_probe.core.errors import BackendError
    from subspace_probe.models import BACKENDS

    with pytest.raises(BackendError, match=REFUSED[pair]) as refused:
        BACKENDS.load(pair[0])(tiny(pair[1]), name="refused")
    assert "backend='native'" in str(refused.value)


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ("llama", {"attn": "mlp"}),
        ("llama", {"mlp": "mlp.up_proj"}),
        ("llama", {"mlp": "feed_forward"}),
        ("gpt2", {"mlp": "attn"}),
        ("gemma2", {"attn": "self_attn"}),
        ("gemma3_text", {"mlp": "mlp"}),
        ("olmo2", {"attn": "post_feedforward_layernorm"}),
        ("gpt_neox", {"norm": "layers.0.input_layernorm"}),
        ("bert", {"mlp": "output"}),
    ],
)
def test_a_wrong_layout_is_refused_on_load(
    monkeypatch: pytest.MonkeyPatch, variant: str, wrong: dict[str, str]
) -> None:
    from subspace_probe.core.errors import BackendError
    from subspace_probe.models import layouts
    from subspace_probe.models.native import NativeModel

    family = VARIANTS[variant][0]
    monkeypatch.setitem(layouts.LAYOUTS, family, replace(layouts.LAYOUTS[family], **wrong))
    with pytest.raises(BackendError, match=r"breaks the identity|unequal widths|have no feed_forward"):
        NativeModel(tiny(variant), name=variant)


def test_models_that_cannot_be_hooked_are_refused() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from subspace_probe.core.errors import BackendError
    from subspace_probe.models.native import NativeModel

    with pytest.raises(BackendError, match=r"training mode.*model\.eval"):
        NativeModel(copy.deepcopy(tiny("llama")).train(), name="training")
    with pytest.raises(BackendError, match="compiled"):
        NativeModel(torch.compile(tiny("llama"), backend="eager"), name="compiled")
    unknown = OPTForCausalLM(
        OPTConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8)
    )
    with pytest.raises(BackendError, match="type 'opt' have no layout"):
        NativeModel(unknown.eval(), name="unknown")


def test_a_name_changes_nothing_else(case: Case) -> None:
    other = case.model.named("other")
    assert (other.spec.name, case.model.spec.name) == ("other", case.variant)
    assert torch.equal(outcome(other, batch(4)), outcome(case.model, batch(4)))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred numbers: a pool of threads costs more than it gives, most with two passes at once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    """No test of this file may leave a hook on the shared models."""
    yield
    assert not {variant: count for variant in VARIANTS if (count := hooks(tiny(variant)))}
