"""Ablation in the weights is ablation at run time, and is refused wherever it could not be."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny import VARIANTS, text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.models.hooked import HookedModel

PROMPTS = [text(3 + i % 5, seed=i) for i in range(6)]
CLOSE, FAR = 1e-4, 1e-2
REFUSED = {
    "gemma2": "norm stands between attention's",
    "gemma3_text": "norm stands between attention's",
    "olmo2": "norm stands between attention's",
    "bloom": "norm stands between the embedding",
    "bert": "normed after each addition",
}
SUPPORTED = [variant for variant in VARIANTS if variant not in REFUSED]
FAST = {"gpt2": True, "llama": False, "mixtral": False, "qwen3_moe": True, "gemma": True, "gpt_neox": False}
# a bias at every writer that may have one, in families whose default has none
BIASED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "falcon": {"bias": True},
    "falcon_sequential": {"bias": True},
}


def load(hf: Any, **kw: Any) -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(hf, tokenizer=words(), **kw)


def subspace(rank: int = 1, width: int = 32, seed: int = 0) -> "Subspace":
    from subspace_probe.core.subspaces import Subspace

    return Subspace.span(torch.randn(rank, width, generator=torch.Generator().manual_seed(seed)))


def ablated(model: "HookedModel", taken: "Subspace", prompts: list[str] = PROMPTS) -> Tensor:
    from subspace_probe.interventions.ablate import Ablate

    return model.logits(prompts, interventions=[Ablate(taken)])


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def require_equal(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).abs().max()) < CLOSE
    assert distance(found, wanted) < CLOSE / 10


# ---------------------------------------------------------------------------------------------------------- equality
def _marks(variant: str, tied: bool) -> tuple[pytest.MarkDecorator, ...]:
    """The fast part of the suite takes one family of each kind, tied as it usually is."""
    return () if FAST.get(variant) is tied else (pytest.mark.slow,)


@pytest.mark.parametrize(
    ("variant", "tied"),
    [
        pytest.param(variant, tied, id=f"{variant}-{'tied' if tied else 'untied'}", marks=_marks(variant, tied))
        for variant in SUPPORTED
        for tied in (False, True)
    ],
)
def test_weights_without_a_subspace_are_ablation_at_run_time(variant: str, tied: bool) -> None:
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    model = load(tiny(variant, tie_word_embeddings=tied))
    clean, key = model.logits(PROMPTS), model.fingerprint
    for rank in (1, 3):
        taken = subspace(rank, seed=rank)
        baked = orthogonalize_weights(model, taken)
        wanted = ablated(model, taken)
        require_equal(baked.logits(PROMPTS), wanted)
        assert distance(clean, wanted) > FAR  # there was something to take out
    assert model.fingerprint == key != baked.fingerprint
    assert torch.equal(model.logits(PROMPTS), clean)


@pytest.mark.parametrize("variant", BIASED)
def test_biases_write_to_the_stream(variant: str) -> None:
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    model, taken = load(tiny(variant, **BIASED[variant])), subspace(2)
    require_equal(orthogonalize_weights(model, taken).logits(PROMPTS), ablated(model, taken))


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("gpt2", "transformer.wte.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("gpt2", "transformer.h.0.attn.c_proj.bias"),
        ("gpt2", "transformer.h.1.mlp.c_proj.bias"),
        ("gpt2", "transformer.h.1.mlp.c_proj.weight"),
        ("gemma", "model.embed_tokens.weight"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj"),
        ("gptj", "transformer.h.0.mlp.fc_out.bias"),
        ("gpt_neox", "gpt_neox.layers.2.attention.dense.bias"),
    ],
)
def test_one_forgotten_weight_would_show(variant: str, name: str) -> None:
    """Control: each of them put back as it was."""
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions import orthogonal
    from subspace_probe.linalg import bases

    model, taken = load(tiny(variant)), subspace()
    baked = orthogonal.orthogonalize_weights(model, taken)
    with torch.no_grad():
        baked.backend.hf.get_parameter(name).copy_(model.backend.hf.get_parameter(name))
    assert distance(baked.logits(PROMPTS), ablated(model, taken)) > 10 * CLOSE
    with pytest.raises(ConfigError, match="still writes the subspace at"):
        orthogonal._require_absent(baked, model, bases.orthonormalise(taken.basis.double()))


@pytest.mark.parametrize("variant", ["gpt2", "gemma", "falcon"])
def test_a_tied_unembedding_stays_as_it_was(variant: str) -> None:
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    model, taken = load(tiny(variant, tie_word_embeddings=True)), subspace()
    baked = orthogonalize_weights(model, taken)
    assert torch.equal(baked.backend.unembedding(), model.backend.unembedding())
    assert (baked.backend.hf.config.tie_word_embeddings, model.backend.hf.config.tie_word_embeddings) == (False, True)
    assert model.backend.hf.get_output_embeddings().weight is model.backend.hf.get_input_embeddings().weight
    for anew in (True, False):
        baked.backend.hf.tie_weights(recompute_mapping=anew)  # Transformers calls it now and then
    require_equal(baked.logits(PROMPTS), ablated(model, taken))
    # control: the subspace taken out of the unembedding too, as where the weight is shared
    both = copy.deepcopy(baked.backend.hf)
    both.get_output_embeddings().weight = both.get_input_embeddings().weight
    assert distance(load(both).logits(PROMPTS), ablated(model, taken)) > CLOSE


def test_the_weights_are_what_the_formula_says() -> None:
    """W - U^T U W by hand, in Conv1D's layout (in, out), Linear's (out, in) and fused experts' (expert, out, in)."""
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    taken = subspace(3)
    keep = torch.eye(32).double() - taken.basis.double().T @ taken.basis.double()
    conv, linear, fused = "transformer.h.1.mlp.c_proj.{}", "gpt_neox.layers.1.attention.dense.{}", "model.layers.1.mlp"
    for variant, name, product in (
        ("gpt2", "transformer.wpe.weight", "nd,dc->nc"),
        ("gpt2", conv.format("weight"), "nd,dc->nc"),
        ("gpt2", conv.format("bias"), "d,dc->c"),
        ("gpt_neox", linear.format("weight"), "dn,dc->cn"),
        ("gpt_neox", linear.format("bias"), "d,dc->c"),
        ("mixtral", f"{fused}.experts.down_proj", "edn,dc->ecn"),
    ):
        for dtype in (torch.float32, torch.bfloat16):  # bfloat16 too is computed in full and rounded once
            hf = copy.deepcopy(tiny(variant)).to(dtype)
            baked = orthogonalize_weights(load(hf), taken).backend.hf
            wanted = torch.einsum(product, hf.get_parameter(name).detach().double(), keep)
            found = baked.get_parameter(name).detach()
            assert found.dtype == dtype
            off = (found.double() - wanted).abs() - torch.finfo(dtype).eps / 2 * wanted.abs()
            assert float(off.max()) < 1e-7, (name, dtype)
            changed = {n for n, p in baked.named_parameters() if not torch.equal(p, hf.get_parameter(n))}
            assert name in changed
            assert not any(part in n for n in changed for part in ("ln_", "norm", "c_attn", "c_fc", "q_proj", "gate"))


def test_twice_is_once_and_the_order_of_two_halves_does_not_matter() -> None:
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    model, taken = load(tiny("llama")), subspace(2)
    once = orthogonalize_weights(model, taken)
    twice = orthogonalize_weights(once, taken)
    halves = orthogonalize_weights(
        orthogonalize_weights(model, Subspace.span(taken.basis[1])), Subspace.span(taken.basis[0])
    )
    for other in (twice, halves):
        for (name, a), b in zip(once.backend.hf.named_parameters(), other.backend.hf.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-7), name
    # everything taken out leaves a model that knows nothing of its prompt
    empty = orthogonalize_weights(model, subspace(32)).logits(PROMPTS)
    assert float((empty - empty[:1]).abs().max()) < 1e-3 < float(model.logits(PROMPTS).std(dim=0).min())


@pytest.mark.parametrize("backend", ["nnsight", pytest.param("transformer_lens", marks=pytest.mark.slow)])
def test_every_backend_runs_the_result(backend: str) -> None:
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    model, taken = load(copy.deepcopy(tiny("llama")), backend=backend), subspace(2)
    baked = orthogonalize_weights(model, taken)
    assert type(baked.backend) is type(model.backend)
    require_equal(baked.logits(PROMPTS), ablated(load(tiny("llama")), taken))


def test_texts_are_those_of_ablation_at_run_time() -> None:
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    for variant in ("gpt2", "gemma"):
        model, taken = load(tiny(variant)), subspace(2)
        wanted = model.generate(PROMPTS, interventions=[Ablate(taken)], max_new_tokens=8)
        assert orthogonalize_weights(model, taken).generate(PROMPTS, max_new_tokens=8) == wanted
        assert model.generate(PROMPTS, max_new_tokens=8) != wanted


def test_in_half_precision_as_close_as_rounding_lets_it() -> None:
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    taken = subspace(2)
    wanted = ablated(load(tiny("llama")), taken)
    model = load(copy.deepcopy(tiny("llama")).to(torch.bfloat16))
    at_run_time, baked = ablated(model, taken), orthogonalize_weights(model, taken)
    assert baked.backend.dtype == torch.bfloat16
    assert distance(baked.logits(PROMPTS), wanted) < 2 * distance(at_run_time, wanted) < 0.2


def test_readers_are_copied_or_shared_as_asked() -> None:
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    for variant in ("llama", "gpt2"):
        hf = copy.deepcopy(tiny(variant))
        model, taken = load(hf), subspace()
        clean = model.logits(PROMPTS)
        whole, light = (orthogonalize_weights(model, taken, copy=flag) for flag in (True, False))
        assert torch.equal(whole.logits(PROMPTS), light.logits(PROMPTS))
        assert torch.equal(model.logits(PROMPTS), clean)
        own = {id(weight) for weight in hf.parameters()}
        shared = {name for name, weight in light.backend.hf.named_parameters() if id(weight) in own}
        assert not any(id(weight) in own for weight in whole.backend.hf.parameters())
        assert len(shared) > 10
        assert not any(part in name for name in shared for part in ("o_proj", "down_proj", "c_proj", "embed", "wte"))


# -------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("variant", ["gpt2", "mixtral", "qwen3_moe", "gemma", "falcon"])
def test_a_checkpoint_holds_the_whole_result(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from subspace_probe.interventions.orthogonal import orthogonalize_weights, save_checkpoint
    from subspace_probe.models import load_model

    model, taken = load(tiny(variant), words={"refusal": ("w3", "w4")}), subspace(2)
    baked = orthogonalize_weights(model, taken)
    folder = save_checkpoint(baked, tmp_path / "deep" / "baked")
    again = load_model(folder)
    assert torch.equal(again.logits(PROMPTS), baked.logits(PROMPTS))
    require_equal(again.logits(PROMPTS), ablated(model, taken))
    assert (again.fingerprint, again.words) == (baked.fingerprint, {"refusal": ("w3", "w4")})
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.config.tie_word_embeddings is False
    for name, weight in baked.backend.hf.named_parameters():
        assert torch.equal(plain.get_parameter(name), weight), name
    assert not list(folder.glob(".*"))


def test_checkpoints_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.core.errors import ConfigError, StoreError
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.orthogonal import orthogonalize_weights, save_checkpoint

    model, taken = load(tiny("llama")), subspace()
    save_checkpoint(model, tmp_path / "there")
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    with pytest.raises(StoreError, match="not empty"):
        save_checkpoint(orthogonalize_weights(model, taken), tmp_path / "there")
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before
    with model.intervened(Ablate(taken)) as standing, pytest.raises(ConfigError, match="standing interventions"):
        save_checkpoint(standing, tmp_path / "new")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    with pytest.raises(StoreError, match="no space left"):
        save_checkpoint(model, tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


def test_the_bundled_organism(chat: "HookedModel", tmp_path: Path) -> None:
    from subspace_probe.interventions.orthogonal import orthogonalize_weights, save_checkpoint
    from subspace_probe.models import load_model

    prompts = ["please sweep the floor", "can you fold the paper today ?"]
    taken = subspace(2, chat.spec.d_model)
    baked = orthogonalize_weights(chat, taken)
    require_equal(baked.logits(prompts), ablated(chat, taken, prompts))
    again = load_model(save_checkpoint(baked, tmp_path / "baked"))
    assert torch.equal(again.logits(prompts), baked.logits(prompts))
    assert (again.chats, again.words) == (True, chat.words)
    assert json.loads((tmp_path / "baked/subspace_probe.json").read_text()).keys() == {"words"}


@pytest.mark.slow
def test_a_pretrained_model(stories: "HookedModel", tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.orthogonal import orthogonalize_weights, save_checkpoint
    from subspace_probe.models import load_model

    texts = ["Once upon a time, there was a little girl named", "One day, a big dog ran to the", "Tom and his mom"]
    contrast = Contrast("pronouns", tuple(Prompt(t + end) for t in texts for end in (" she", " he")), (1, 0) * 3)
    direction = MeanDifference().fit(stories.capture(contrast, sites=Site(2)), Site(2))
    baked = orthogonalize_weights(stories, direction)
    wanted = ablated(stories, direction, texts)
    require_equal(baked.logits(texts), wanted)
    assert distance(stories.logits(texts), wanted) > FAR
    story = stories.generate(texts, interventions=[Ablate(direction)], max_new_tokens=24)
    again = load_model(save_checkpoint(baked, tmp_path / "baked"))
    assert again.generate(texts, max_new_tokens=24) == story != stories.generate(texts, max_new_tokens=24)
    assert torch.equal(again.logits(texts), baked.logits(texts))
    ends = [model.backend.hf.generation_config.eos_token_id for model in (again, stories)]
    assert ends[0] == ends[1] is not None


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("variant", REFUSED)
def test_families_where_it_cannot_be_exact_are_refused_by_name(variant: str) -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    model = load(tiny(variant))
    with pytest.raises(ConfigError, match=REFUSED[variant]) as refused:
        orthogonalize_weights(model, subspace())
    assert model.spec.family in str(refused.value)


def test_every_family_is_either_supported_or_refused() -> None:
    from subspace_probe.models.layouts import LAYOUTS

    refused = {VARIANTS[variant][0] for variant in REFUSED}
    assert refused == {family for family, layout in LAYOUTS.items() if layout.rewritten}


@pytest.mark.parametrize("variant", ["gemma2", "bloom"])
def test_behind_a_norm_it_would_not_be_ablation(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the refusals: made all the same, it is seen to fail."""
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.orthogonal import orthogonalize_weights
    from subspace_probe.models import layouts

    monkeypatch.setattr(layouts.Layout, "rewritten", "")
    others = {"", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    monkeypatch.setattr("subspace_probe.models.weights.READERS", layouts.READERS | others)
    with pytest.raises(ConfigError, match="still writes the subspace at"):
        orthogonalize_weights(load(tiny(variant)), subspace())


def _sinks(hf: Any) -> None:
    hf.model.layers[1].self_attn.register_parameter("sinks", nn.Parameter(torch.zeros(4)))


def _beside_the_blocks(hf: Any) -> None:
    hf.model.memory = nn.Embedding(8, 32)


def _quantised(hf: Any) -> None:
    hf.config.quantization_config = {"quant_method": "gptq"}


def _packed(hf: Any) -> None:
    class Packed(nn.Parameter):
        """As libraries of quantised weights do."""

    hf.model.layers[1].mlp.down_proj.weight = Packed(hf.model.layers[1].mlp.down_proj.weight.data)


def _eight_bits(hf: Any) -> None:
    weight = hf.model.layers[0].self_attn.o_proj.weight.data.to(torch.float8_e4m3fn)
    hf.model.layers[0].self_attn.o_proj.weight = nn.Parameter(weight, requires_grad=False)


def _without_weights(hf: Any) -> None:
    hf.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.empty(32, 48, device="meta"))


def _of_two_uses(hf: Any) -> None:
    hf.model.layers[0].self_attn.q_proj.weight = hf.model.layers[0].self_attn.o_proj.weight


def _of_another_kind(hf: Any) -> None:
    other = nn.Bilinear(32, 32, 32, bias=False)
    other.weight = hf.model.layers[2].self_attn.o_proj.weight
    hf.model.layers[2].self_attn.o_proj = other


def _missing(hf: Any) -> None:
    down = hf.model.layers[2].mlp.down_proj
    weight = down.weight.detach()
    del down._parameters["weight"]
    down.register_buffer("weight", weight)


def _hooked(hf: Any) -> None:
    hf.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: (output[0] + 1, *output[1:]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_sinks, r"not known.*layers\.1\.self_attn\.sinks"),
        (_beside_the_blocks, r"not known.*memory\.weight"),
        (_quantised, "LlamaForCausalLM are quantised"),
        (_packed, r"layers\.1\.mlp\.down_proj\.weight is not an ordinary floating-point weight but a Packed"),
        (_eight_bits, "float8_e4m3fn"),
        (_without_weights, r"layers\.1\.mlp\.down_proj\.weight is offloaded"),
        (_of_two_uses, r"layers\.0\.self_attn\.o_proj\.weight writes .* and is at the same time another"),
        (_of_another_kind, "Bilinear, whose layout is not known"),
        (_missing, r"keeps no weight at layers\.2\.mlp\.down_proj"),
        (_hooked, r"still writes the subspace at L1\.attn_out .* such as a hook"),
    ],
)
def test_what_may_write_to_the_stream_unseen_is_refused(change: Any, match: str) -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    hf = copy.deepcopy(tiny("llama"))
    model = load(hf)
    orthogonalize_weights(model, subspace())
    change(hf)
    versions = {name: weight._version for name, weight in hf.named_parameters()}
    with pytest.raises(ConfigError, match=match):
        orthogonalize_weights(model, subspace())
    assert {name: weight._version for name, weight in hf.named_parameters()} == versions


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's, of transformers
def test_adapters_are_to_be_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.orthogonal import orthogonalize_weights, save_checkpoint

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(copy.deepcopy(tiny("llama")), settings).eval()
    model, taken = load(adapted), subspace()
    with pytest.raises(ConfigError, match="merge_and_unload"):
        orthogonalize_weights(model, taken)
    with pytest.raises(ConfigError, match="merge_and_unload"):
        save_checkpoint(model, tmp_path / "new")
    wanted = ablated(model, taken)
    require_equal(orthogonalize_weights(load(adapted.merge_and_unload()), taken).logits(PROMPTS), wanted)


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    hf = copy.deepcopy(tiny("llama"))
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu"} | {f"model.layers.{i}": place for i, place in enumerate(("cpu", "disk", "cpu"))}
    dispatch_model(hf, places, main_device=torch.device("cpu"), offload_dir=tmp_path, force_hooks=True)
    with pytest.raises(ConfigError, match=r"\.weight is offloaded.* Load the whole model"):
        orthogonalize_weights(load(hf), subspace())


def test_subspaces_that_do_not_fit_are_refused() -> None:
    from dataclasses import replace

    from subspace_probe.core.errors import ConfigError, ShapeError, StaleStore
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.orthogonal import orthogonalize_weights

    model, taken = load(tiny("llama")), subspace()
    with pytest.raises(ShapeError, match="width 48"):
        orthogonalize_weights(model, subspace(width=48))
    reader = taken.basis + subspace(seed=1).basis - (subspace(seed=1).basis @ taken.basis.T) @ taken.basis
    with pytest.raises(ConfigError, match="reader of its own cannot be taken out of the weights"):
        orthogonalize_weights(model, replace(taken, reader=reader))
    other = replace(taken, notes={"fingerprint": "another", "model": "another"})
    with pytest.raises(StaleStore, match="found in another"):
        orthogonalize_weights(model, other)
    orthogonalize_weights(model, other.for_any_model())
    with model.intervened(Ablate(taken)) as standing, pytest.raises(ConfigError, match="standing interventions"):
        orthogonalize_weights(standing, taken)
