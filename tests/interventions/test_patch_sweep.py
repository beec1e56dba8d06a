"""Sweeps equal a whole pass a cell, by `run(writes=...)` and by plain Torch hooks, in every kind of family."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.interventions.sweep_results import PatchSweep
    from subspace_probe.models.hooked import HookedModel

TOKENS = 6
CLOSE = 1e-5
# plain, grouped queries, parallel, ALiBi, in-place additions, experts, norms behind a sublayer, sliding windows
KINDS = ["gpt2", "llama", "gpt_neox", "bloom", "falcon_sequential", "qwen3_moe", "gemma2", "mistral"]
FAST = {"gpt2", "llama", "gemma2"}


def metric(logits: Tensor, prompts: Sequence[object]) -> Tensor:
    """Curved, and of several logits."""
    return torch.tanh(0.1 * logits[:, 5]) - logits[:, 9] + 0.05 * logits[:, 7].square()


def model_of(variant: str, backend: str = "native", **changed: Any) -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny(variant, **changed), backend=backend, tokenizer=words())


def texts(*lengths: int, seed: int) -> list[str]:
    return [text(length, seed + i) for i, length in enumerate(lengths)]


CLEAN, CORRUPT = texts(TOKENS, TOKENS, seed=0), texts(TOKENS, TOKENS, seed=50)


def check(
    model: "HookedModel",
    sweep: "PatchSweep",
    bases: list[str],
    sources: list[str],
    columns: Callable[[int], tuple[list[int], list[int]]],
) -> None:
    """Every cell against whole passes that read and write one site.

    Args:
        columns: of a position, the token of each base and of each source.
    """
    from subspace_probe.core.sites import Site

    assert bool(sweep.values.isfinite().all())
    scale, heads = float(sweep.values.abs().max()), sweep.values.shape[3] if sweep.heads else 1
    for s, name in enumerate(sweep.streams):
        for at, layer in enumerate(sweep.layers):
            for head in range(heads):
                site = Site(layer, name, head if sweep.heads else None)
                cells = sweep.values[s, at, :, head] if sweep.heads else sweep.values[s, at]
                for row, (base, source) in enumerate(zip(bases, sources, strict=True)):
                    states = model.run(model.tokens([source]), reads=[site]).reads[site][0]
                    for p in range(len(sweep.positions)):
                        to, of = (side[row] for side in columns(p))

                        def put(x: Tensor, ctx: object, to: int = to, state: Tensor = states[of]) -> Tensor:
                            edited = x.clone()
                            edited[:, to] = state
                            return edited

                        logits = model.run(model.tokens([base]), writes={site: put}).logits
                        wanted = float(metric(logits[:, -1], [base])[0])
                        assert float(cells[p, row]) == pytest.approx(wanted, abs=CLOSE * scale), site
    assert float(sweep.values.flatten(0, -2).std(0).min()) > 1e-2 * scale  # control: cells differ by far more


def same(p: int) -> tuple[list[int], list[int]]:
    """Prompts of one length: a position is itself."""
    return [p, p], [p, p]


def marked(variant: str) -> Any:
    return pytest.param(variant, marks=() if variant in FAST else (pytest.mark.slow,))


@pytest.mark.parametrize("variant", [marked(kind) for kind in KINDS])
def test_every_stream_equals_whole_passes(variant: str) -> None:
    from subspace_probe.core.sites import FORWARD_ORDER, READ_ONLY
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model = model_of(variant)
    streams = [name for name in FORWARD_ORDER if name not in READ_ONLY | {*model.spec.unsupported}]
    sweep = patch_sweep(model, CLEAN, CORRUPT, metric, streams=streams, layers=[0, -1], batch_tokens=40)
    assert sweep.values.shape == (len(streams), 2, TOKENS, 2)
    assert sweep.engine == "climbing"
    assert sweep.computed == sweep.values.numel()
    check(model, sweep, CORRUPT, CLEAN, same)


@pytest.mark.parametrize("variant", [marked("llama"), marked("bloom")])
def test_every_head_equals_whole_passes(variant: str) -> None:
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model = model_of(variant)
    sweep = patch_sweep(model, CLEAN, CORRUPT, metric, streams=("z",), layers=[1], heads=True, mode="noise")
    assert sweep.values.shape == (1, 1, TOKENS, 4, 2)
    check(model, sweep, CLEAN, CORRUPT, same)


def hooked(hf: Any, base: list[str], source: list[str], layer: int, column: int) -> Tensor:
    """`resid_pre` of one cell by a plain forward pre-hook on the Hugging Face model: nothing of this package."""
    ids = [words()(side, return_tensors="pt")["input_ids"] for side in (base, source)]
    kept: list[Tensor] = []
    block = hf.base_model.h[layer]
    handle = block.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        hf(ids[1])
        handle.remove()

        def patch(module: Any, args: Any) -> Any:
            x = args[0].clone()
            x[:, column] = kept[0][:, column]
            return (x, *args[1:])

        handle = block.register_forward_pre_hook(patch)
        logits = hf(ids[0]).logits[:, -1]
        handle.remove()
    return metric(logits, base)


def test_equals_a_loop_of_plain_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.interventions import patch_cells
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model, hf = model_of("gpt2"), tiny("gpt2")
    wanted = torch.stack(
        [torch.stack([hooked(hf, CORRUPT, CLEAN, layer, p) for p in range(TOKENS)]) for layer in (0, 1, 2)]
    )
    sweep = patch_sweep(model, CLEAN, CORRUPT, metric)
    scale = float(wanted.abs().max())
    assert float((sweep.values[0] - wanted).abs().max()) < CLOSE * scale
    # control: a state put one token too late is another result
    plain = patch_cells.Entry

    def late(layer: int, prompts: Tensor, columns: Tensor, states: Tensor) -> object:
        return plain(layer, prompts, (columns + 1).clamp(max=TOKENS - 1), states)

    monkeypatch.setattr(patch_cells, "Entry", late)
    wrong = patch_sweep(model, CLEAN, CORRUPT, metric)
    assert float((wrong.values[0] - wanted).abs().max()) > 1e-2 * scale


RAGGED = texts(5, 8, 5, 7, seed=100), texts(6, 4, 6, 7, seed=150)


def ends(p: int) -> tuple[list[int], list[int]]:
    """Of each corrupt (base) and clean (source) prompt: the third, the last but two, the last."""
    lengths = [6, 4, 6, 7], [5, 8, 5, 7]
    return tuple([2 if p == 0 else length - (3, 1)[p - 1] for length in side] for side in lengths)  # pyright: ignore


@pytest.mark.parametrize("kind", ["native", pytest.param("transformer_lens", marks=pytest.mark.slow), "nnsight"])
def test_ragged_pairs_with_stated_positions(kind: str) -> None:
    """In one prompt of four tokens the last but two is not the third: positions may meet in others, and stay apart."""
    from subspace_probe.core.tokens import LAST, at
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model = model_of("llama", kind)
    streams = ("resid_pre", "mlp_out")
    sweep = patch_sweep(
        model, *RAGGED, metric, streams=streams, layers=[0, 2], positions=[at(2), LAST.offset(-2), LAST]
    )
    assert sweep.engine == ("climbing" if kind == "native" else "passes")
    check(model, sweep, RAGGED[1], RAGGED[0], ends)


def test_lengths_that_differ_need_positions() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, PositionError, UnsupportedSite
    from subspace_probe.core.tokens import ALL
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model = model_of("llama")
    with pytest.raises(PositionError, match=r"have 4 to 8 tokens.*positions="):
        patch_sweep(model, *RAGGED, metric)
    with pytest.raises(DataError, match="2 clean and 1 corrupt"):
        patch_sweep(model, CLEAN, CORRUPT[:1], metric)
    with pytest.raises(PositionError, match="all is not one token"):
        patch_sweep(model, CLEAN, CORRUPT, metric, positions=[ALL])
    with pytest.raises(ConfigError, match="only z has heads"):
        patch_sweep(model, CLEAN, CORRUPT, metric, heads=True)
    with pytest.raises(UnsupportedSite, match="parallel"):
        patch_sweep(model_of("gpt_neox"), CLEAN, CORRUPT, metric, streams=["resid_mid"])


def test_a_prompt_with_itself_changes_nothing() -> None:
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model, mixed = model_of("llama"), [CLEAN[0], CORRUPT[1]]  # only the second is another prompt
    sweep = patch_sweep(model, CLEAN, mixed, metric, streams=("resid_pre", "z", "mlp_out"))
    scale = float(sweep.clean.abs().max())
    assert float((sweep.values - sweep.clean)[..., 0].abs().max()) < CLOSE * scale
    assert float((sweep.values - sweep.clean)[..., 1].abs().max()) > 1e-2 * scale  # control
    skipped = patch_sweep(model, CLEAN, mixed, metric, skip_equal=True)
    assert skipped.skipped >= skipped.values[..., 0].numel()
    assert torch.equal(skipped.values[..., 0], skipped.clean[0].expand_as(skipped.values[..., 0]))


def test_nothing_is_shared_out_where_nothing_differs() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.patch_sweep import patch_sweep

    def shifted(by: float, size: float = 1.0) -> "Callable[[Tensor, Sequence[object]], Tensor]":
        """So much more for the first clean prompts' run than for the corrupt ones', which come first."""
        calls: list[int] = []

        def judge(logits: Tensor, prompts: Sequence[object]) -> Tensor:
            calls.append(1)
            return torch.full((len(logits),), size, dtype=torch.float64) + (by if len(calls) == 2 else 0.0)

        return judge

    model = model_of("llama")
    settings: Any = {"layers": [1], "positions": [-1]}
    with pytest.raises(ConfigError, match="metric is the same for the clean and the corrupt prompts"):
        patch_sweep(model, CLEAN, CLEAN, metric, **settings)
    for by, size in ((0.0, 0.0), (0.0, 1.0), (1e-8, 1.0)):
        with pytest.raises(ConfigError, match="no difference that a state could carry"):
            patch_sweep(model, CLEAN, CORRUPT, shifted(by, size), **settings)
    # control: small beside nothing, and more than rounding
    assert patch_sweep(model, CLEAN, CORRUPT, shifted(1e-8, 0.0), **settings).effect.tolist() == [[[0.0]]]
    assert patch_sweep(model, CLEAN, CORRUPT, shifted(1e-4, 1.0), **settings).effect.tolist() == [[[0.0]]]


def test_shares_of_an_unresolved_difference_are_inconclusive() -> None:
    """The difference of two prompts is 1 and -0.9: no one knows the sign of the mean's."""
    from dataclasses import replace

    from subspace_probe.interventions.patch_sweep import patch_sweep

    sweep = patch_sweep(model_of("llama"), CLEAN, CORRUPT, metric, layers=[1], positions=[-1])
    unsure = replace(sweep, clean=sweep.corrupt + torch.tensor([1.0, -0.9], dtype=torch.float64))
    strongest = unsure.report().finding("effect.strongest")
    assert strongest.interval is None
    assert strongest.verdict == "unaudited"
    assert "inconclusive" in strongest.note
    assert "inconclusive" in unsure.table.about
    sure = replace(sweep, clean=sweep.corrupt + torch.tensor([1.0, 0.9], dtype=torch.float64))  # control
    strongest = sure.report().finding("effect.strongest")
    assert strongest.interval is not None
    assert "inconclusive" not in strongest.note + sure.table.about


def test_equal_states_are_skipped_exactly() -> None:
    """Prompts that differ at one token: nothing before it can differ, nor any other token in front of block 0."""
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model = model_of("gpt2")
    clean = [CLEAN[0], CLEAN[1]]
    corrupt = [" ".join([*one.split()[:3], "w77", *one.split()[4:]]) for one in clean]
    whole = patch_sweep(model, clean, corrupt, metric)
    sweep = patch_sweep(model, clean, corrupt, metric, skip_equal=True)
    assert sweep.skipped == 2 * (3 * 3 + 2)  # two prompts; three earlier tokens of three layers, two later ones of one
    assert sweep.computed + sweep.skipped == sweep.values.numel()
    assert float((sweep.values - whole.values).abs().max()) < CLOSE * float(whole.values.abs().max())
    assert torch.equal(sweep.values[0, 0, 5], sweep.corrupt)


def adapted(targets: list[str], layers: list[int] | None) -> Any:
    """A Llama with LoRA on some matrices, far from nothing."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules=targets, layers_to_transform=layers)
        model = peft.get_peft_model(copy.deepcopy(tiny("llama")), settings).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.3)
    return model


def plainly(hf: Any, base: list[str], source: list[str], layers: int) -> Tensor:
    """`resid_pre` of all cells by plain forward pre-hooks, shape [layer, position, n]."""
    ids = [words()(side, return_tensors="pt")["input_ids"] for side in (base, source)]
    width, found = ids[0].shape[1], list[Tensor]()
    for block in hf.base_model.model.model.layers[:layers]:
        kept: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0]))
        hf(input_ids=ids[1])
        handle.remove()
        for column in range(width):

            def patch(module: Any, args: Any, column: int = column, state: Tensor = kept[0]) -> Any:
                x = args[0].clone()
                x[:, column] = state[:, column]
                return (x, *args[1:])

            handle = block.register_forward_pre_hook(patch)
            found.append(metric(hf(input_ids=ids[0]).logits[:, -1], base))
            handle.remove()
    return torch.stack(found).view(layers, width, -1).double()


ADAPTED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's, of transformers


@ADAPTED
@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
@pytest.mark.parametrize(("targets", "layers"), [(["o_proj"], [0]), (["o_proj"], None), (["q_proj"], None)])
def test_adapted_projections_equal_plain_hooks(targets: list[str], layers: list[int] | None, tokens: int) -> None:
    from subspace_probe.interventions.patch_sweep import patch_sweep
    from subspace_probe.models import load_model

    hf = adapted(targets, layers)
    clean, corrupt = texts(tokens, tokens, seed=0), texts(tokens, tokens, seed=50)
    sweep = patch_sweep(load_model(hf, tokenizer=words()), clean, corrupt, metric)
    assert sweep.engine == "climbing"
    with torch.no_grad():
        wanted = plainly(hf, corrupt, clean, 3)
        with hf.disable_adapter():
            unadapted = plainly(hf, corrupt, clean, 3)
    scale = float(wanted.abs().max())
    assert float((sweep.values[0] - wanted).abs().max()) < CLOSE * scale
    if tokens > 1 or "o_proj" in targets:  # one token is all that attention can look at, whatever the query
        assert float((unadapted - wanted).abs().max()) > 1e-2 * scale  # control: the adapter is felt


@ADAPTED
def test_what_is_wrongly_reused_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind attention nothing can be reused: a token replaced by itself would not show it, a changed one does."""
    from subspace_probe.interventions.patch_sweep import patch_sweep
    from subspace_probe.models import climbing, load_model, native

    hf = adapted(["o_proj"], [0])
    with torch.no_grad():
        wanted = plainly(hf, CORRUPT, CLEAN, 3)
    scale = float(wanted.abs().max())
    outer = {block.self_attn.o_proj for block in hf.base_model.model.model.layers}

    def keep(self: climbing.Keeper, module: Any, args: Any, output: Tensor) -> None:
        if module not in outer:  # but the adapter's parts
            self.outputs[module] = output

    monkeypatch.setattr(climbing.Keeper, "__call__", keep)
    sweep = patch_sweep(load_model(hf, tokenizer=words()), CLEAN, CORRUPT, metric)
    assert sweep.engine == "passes"
    assert float((sweep.values[0] - wanted).abs().max()) < CLOSE * scale
    # control: without that check the wrong numbers come out
    monkeypatch.setattr(native.NativeModel, "_followed", lambda self, recording: True)
    wrong = patch_sweep(load_model(hf, tokenizer=words()), CLEAN, CORRUPT, metric)
    assert wrong.engine == "climbing"
    assert float((wrong.values[0] - wanted).abs().max()) > 1e-2 * scale


@pytest.mark.parametrize("variant", ["gpt2", "llama", "phi3", "gpt_neox", "gptj", "bloom", "falcon"])
def test_queries_keys_and_values_are_reused(variant: str) -> None:
    """Every matrix inside attention but the output projection, in every block."""
    from subspace_probe.models.climbing import Records

    model = model_of(variant)
    assert isinstance(model.backend, Records)
    recording = model.backend.record(model.tokens(CLEAN))
    assert recording is not None
    layout: Any = model.backend.layout
    for layer, block in enumerate(model.backend.blocks):
        inside = dict(block.get_submodule(layout.attention).named_modules())
        names = {name for name, module in inside.items() if module in recording.projected[layer]}
        matrices = {name for name, module in inside.items() if getattr(module, "weight", None) is not None}
        assert names
        assert names == matrices - {layout.z.removeprefix(f"{layout.attention}.")}


def test_subspaces_exchange_their_component() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model, streams = model_of("llama"), ("resid_pre", "attn_out")
    full = patch_sweep(model, CLEAN, CORRUPT, metric, streams=streams)
    scale = float(full.values.abs().max())
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    everything = patch_sweep(model, CLEAN, CORRUPT, metric, streams=streams, subspace=Subspace.span(basis))
    assert float((everything.values - full.values).abs().max()) < 10 * CLOSE * scale
    line = Subspace.span(basis[0])
    sweep = patch_sweep(model, CLEAN, CORRUPT, metric, streams=streams, subspace=line)
    assert float((sweep.values - full.values).abs().max()) > 1e-2 * scale
    site, clean, corrupt = Site(1, "attn_out"), model.tokens(CLEAN), model.tokens(CORRUPT)
    states = model.run(clean, reads=[site]).reads[site][:, 2]

    def put(x: Tensor, ctx: object) -> Tensor:
        edited, unit = x.clone(), basis[0]
        edited[:, 2] += ((states - x[:, 2]) @ unit)[:, None] * unit
        return edited

    wanted = metric(model.run(corrupt, writes={site: put}).logits[:, -1], CORRUPT)
    assert torch.allclose(sweep.values[1, 1, 2], wanted.double(), atol=CLOSE * scale)


def test_subspaces_must_fit() -> None:
    """The same that a patch refuses."""
    from dataclasses import replace

    from subspace_probe.core.errors import ConfigError, ShapeError, StaleStore
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.attribution import attribution
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model, line = model_of("llama"), Subspace.span(torch.eye(32)[0])
    for sweep in (patch_sweep, attribution):
        with pytest.raises(ConfigError, match="reader of its own"):
            sweep(model, CLEAN, CORRUPT, metric, subspace=replace(line, reader=torch.eye(32)[:1] + torch.eye(32)[1:2]))
        with pytest.raises(StaleStore, match="found in another model"):
            sweep(model, CLEAN, CORRUPT, metric, subspace=replace(line, notes={"fingerprint": "0" * 32}))
        with pytest.raises(ShapeError, match="width 8"):
            sweep(model, CLEAN, CORRUPT, metric, subspace=Subspace.span(torch.eye(8)[0]))
        own = replace(line, notes={"fingerprint": model.fingerprint})
        sweep(model, CLEAN, CORRUPT, metric, layers=[0], positions=[-1], subspace=own)  # control


def test_modes_are_each_others_reverse() -> None:
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model = model_of("llama")
    denoised = patch_sweep(model, CLEAN, CORRUPT, metric)
    noised = patch_sweep(model, CORRUPT, CLEAN, metric, mode="noise")
    assert torch.equal(denoised.values, noised.values)
    assert torch.equal(denoised.base, noised.base)
    assert torch.equal(denoised.corrupt, noised.clean)
    assert torch.allclose(denoised.effect, noised.effect)
    gap = (denoised.clean - denoised.corrupt).mean()
    assert torch.allclose(denoised.effect, (denoised.values.mean(-1) - denoised.corrupt.mean()) / gap)


def test_standing_edits_are_respected() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.patch_sweep import patch_sweep
    from subspace_probe.interventions.steer import Steer

    model = model_of("llama")
    plain = patch_sweep(model, CLEAN, CORRUPT, metric, layers=[1])
    vector = Subspace.span(torch.randn(32, generator=torch.Generator().manual_seed(3)))
    with model.intervened(Steer(vector, site=Site(1), strength=2.0)) as steered:
        sweep = patch_sweep(steered, CLEAN, CORRUPT, metric, layers=[1])
        assert sweep.engine == "passes"
        check(steered, sweep, CORRUPT, CLEAN, same)
    assert float((sweep.values - plain.values).abs().max()) > 1e-2


def test_metrics_see_their_own_prompts_and_say_what_they_read() -> None:
    from subspace_probe.core.errors import ConfigError, ShapeError
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model = model_of("llama")
    pairs = [
        [Prompt(text=one, answer=f"w{10 + i}", foil="w3") for i, one in enumerate(side)] for side in (CLEAN, CORRUPT)
    ]

    class Few:
        """Reads two logits of each prompt, and says which, or one less."""

        def __init__(self, told: int) -> None:
            self.told = told

        def __call__(self, logits: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            ids = torch.tensor([int(prompt.answer[1:]) for prompt in prompts if prompt.answer])
            return logits[torch.arange(len(ids)), ids] - logits[:, 3]

        def tokens(self, prompts: Sequence[Prompt]) -> Tensor:
            return torch.tensor([[int(prompt.answer[1:]), 3][: self.told] for prompt in prompts if prompt.answer])

    named = patch_sweep(model, *pairs, "logit_difference", batch_tokens=24)
    sweep = patch_sweep(model, *pairs, Few(2))
    assert torch.allclose(sweep.values, named.values, atol=CLOSE * float(named.values.abs().max()))
    assert float((named.values[..., 0] - named.values[..., 1]).abs().min()) > 0
    with pytest.raises(ConfigError, match="reads other tokens"):
        patch_sweep(model, *pairs, Few(1))
    with pytest.raises(ShapeError, match="one number each"):
        patch_sweep(model, *pairs, lambda logits, prompts: logits.sum())


def test_what_cannot_be_continued_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that does not reproduce the plain run is not used."""
    from subspace_probe.interventions.patch_sweep import patch_sweep
    from subspace_probe.models import climbing

    model = model_of("llama")
    wanted = patch_sweep(model, CLEAN, CORRUPT, metric, layers=[0, 2])
    monkeypatch.setattr(climbing, "_behind", None)
    monkeypatch.setattr(climbing._Earlier, "update", lambda self, keys, values, *_: (keys * 2, values))
    sweep = patch_sweep(model, CLEAN, CORRUPT, metric, layers=[0, 2])
    assert sweep.engine == "passes"
    assert torch.allclose(sweep.values, wanted.values, atol=CLOSE * float(wanted.values.abs().max()))


def test_reports_survive_json_and_name_the_strongest_cell() -> None:
    from dataclasses import replace

    from subspace_probe.core.reports import Report
    from subspace_probe.interventions.patch_sweep import patch_sweep

    sweep = patch_sweep(model_of("llama"), CLEAN, CORRUPT, metric, streams=("resid_pre", "mlp_out"))
    sweep = replace(sweep, clean=sweep.corrupt + torch.tensor([1.0, 0.9], dtype=torch.float64))
    report = Report.from_json(sweep.report().to_json())
    table = report.tables["patch_sweep"]
    assert len(table.rows) == sweep.values[..., 0].numel()
    assert table.column("effect") == pytest.approx(sweep.effect.flatten().tolist())
    strongest = report.finding("effect.strongest")
    assert strongest.estimate == pytest.approx(float(sweep.effect.flatten()[sweep.effect.abs().argmax()]))
    assert strongest.verdict == "unaudited"
    assert strongest.interval is not None
    assert strongest.estimate == pytest.approx((strongest.interval.low + strongest.interval.high) / 2, abs=1e-6)
    shown = CORRUPT[0].split()
    assert table.where(stream="resid_pre", layer=0).column("token") == [""] * len(shown)  # prompts share no token
