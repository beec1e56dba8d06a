"""The weight delta against planted low-rank updates, plain SVDs, noise, and the organisms' planted refusal."""

import copy
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.tiny import tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.models.hooked import HookedModel

# paths in block 1: output projection, down projection, a matrix that reads the stream, the norm in front of it
PLACES = {
    "gpt2": ("attn.c_proj", "mlp.c_proj", "attn.c_attn", "ln_1"),
    "llama": ("self_attn.o_proj", "mlp.down_proj", "self_attn.k_proj", "input_layernorm"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h", "attention.query_key_value", "input_layernorm"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj", "self_attn.qkv_proj", "input_layernorm"),
}


def loaded(hf: Any) -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(hf, tokenizer=words())


def tuned(variant: str, path: str, update: Tensor) -> "HookedModel":
    """A copy of a tiny model with [out, in] added to one weight of block 1."""
    hf = copy.deepcopy(tiny(variant))
    blocks = getattr(hf.base_model, "h", None) or hf.base_model.layers
    weight = blocks[1].get_submodule(path).weight
    with torch.no_grad():
        weight += update.T if variant == "gpt2" else update
    return loaded(hf)


def rows_of(variant: str, path: str) -> tuple[int, int]:
    blocks = getattr(tiny(variant).base_model, "h", None) or tiny(variant).base_model.layers
    shape = tuple(blocks[1].get_submodule(path).weight.shape)
    return shape[::-1] if variant == "gpt2" else shape


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fit(base: "HookedModel", other: "HookedModel", site: str, **settings: Any) -> "Subspace":
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.finders.weight_delta import WeightDelta

    return WeightDelta(other, **settings).fit(base, None, Site.parse(site), LAST)


def overlap(found: "Subspace", span: Tensor) -> float:
    from subspace_probe.linalg.angles import overlap as between

    return between(found.basis.double(), span.double())


@pytest.mark.parametrize("variant", list(PLACES))
@pytest.mark.parametrize(("which", "site"), [(0, "L1.attn_out"), (1, "L1.mlp_out"), (0, "L1.resid_post")])
def test_a_planted_update_is_recovered_in_the_output_space(variant: str, which: int, site: str) -> None:
    path = PLACES[variant][which]
    out, inner = rows_of(variant, path)
    u, v = drawn(2, out), drawn(2, inner, seed=1)
    base, other = loaded(tiny(variant)), tuned(variant, path, u.T @ v)
    found = fit(base, other, site)
    assert found.found
    assert found.rank == 2  # by the null
    assert overlap(found, u) > 0.999
    assert overlap(found, drawn(2, out, seed=9)) < 0.3  # control: another plane
    expected = torch.linalg.svdvals((u.T @ v).double())[:2]
    assert torch.allclose(found.scale.double(), expected, rtol=1e-4)
    assert found.scale_unit == "weight"


@pytest.mark.parametrize("variant", list(PLACES))
def test_a_planted_update_is_recovered_in_the_input_space(variant: str) -> None:
    """Through the norm in front of it, an update that reads `v` of the normed state reads `gain * v` of the stream."""
    path, norm = PLACES[variant][2:]
    out, inner = rows_of(variant, path)
    u, v = drawn(2, out), drawn(2, inner, seed=1)
    base, other = loaded(tiny(variant)), tuned(variant, path, u.T @ v)
    blocks = getattr(tiny(variant).base_model, "h", None) or tiny(variant).base_model.layers
    read = v * blocks[1].get_submodule(norm).weight.detach()
    if variant in ("gpt2", "gpt_neox"):
        read = read - read.mean(dim=1, keepdim=True)
    for site in ("L1.resid_pre", "L0.resid_post", "L0.mlp_out"):
        found = fit(base, other, site, side="right", rank=2)
        assert found.found
        assert overlap(found, read) > 0.999
        assert overlap(found, v) < 0.998  # control: the input space of the matrix alone


@pytest.mark.parametrize("variant", list(PLACES))
@pytest.mark.parametrize(("which", "site"), [(0, "L1.z"), (1, "L1.mlp_post")])
def test_projections_are_read_without_a_norm(variant: str, which: int, site: str) -> None:
    path = PLACES[variant][which]
    out, inner = rows_of(variant, path)
    u, v = drawn(2, out), drawn(2, inner, seed=1)
    found = fit(loaded(tiny(variant)), tuned(variant, path, u.T @ v), site, side="right", rank=2)
    assert overlap(found, v) > 0.9999
    if site == "L1.z":
        head = fit(loaded(tiny(variant)), tuned(variant, path, u.T @ v), "L1.z.h3", side="right", rank=2)
        assert overlap(head, v[:, 24:]) > 0.9999


def test_both_sides_stack_what_writes_and_what_reads() -> None:
    """Against NumPy's SVD of the stacked differences, worked out by hand for Llama."""
    base, hf = loaded(tiny("llama")), copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for i, parameter in enumerate(hf.parameters()):
            parameter += 0.1 * drawn(*parameter.shape, seed=i)
    other = loaded(hf)
    parts = []
    for sign, model in ((1, hf), (-1, tiny("llama"))):
        low, high = model.model.layers[1], model.model.layers[2]
        writes = [low.self_attn.o_proj.weight, low.mlp.down_proj.weight]
        reads = [high.self_attn.q_proj, high.self_attn.k_proj, high.self_attn.v_proj]
        mlp = [high.mlp.gate_proj, high.mlp.up_proj]
        stack = [w.detach().double().T for w in writes]
        stack += [m.weight.detach().double() * high.input_layernorm.weight.detach().double() for m in reads]
        stack += [m.weight.detach().double() * high.post_attention_layernorm.weight.detach().double() for m in mlp]
        parts.append(sign * torch.cat(stack))
    _, singular, vectors = np.linalg.svd((parts[0] + parts[1]).numpy(), full_matrices=False)
    found = fit(base, other, "L1.resid_post", side="both", rank=5)
    assert np.allclose(found.scale.numpy(), singular[:5], rtol=1e-5)
    assert np.allclose(np.abs(found.basis.numpy() @ vectors[:5].T), np.eye(5), atol=1e-4)
    notes = found.notes
    assert notes["energy"] == pytest.approx(float((singular[:5] ** 2).sum() / (singular**2).sum()))
    assert notes["stable_rank"] == pytest.approx(float((singular**2).sum() / singular[0] ** 2))
    assert sum(m["delta"] ** 2 for m in notes["matrices"].values()) == pytest.approx(float((singular**2).sum()))
    assert len(notes["matrices"]) == 7
    assert json.loads(json.dumps(notes)) == notes
    assert notes["fingerprint"] == base.fingerprint
    assert notes["other_fingerprint"] == other.fingerprint
    # the two checkpoints may change places
    assert torch.allclose(found.basis, fit(other, base, "L1.resid_post", side="both", rank=5).basis, atol=1e-5)


def test_energy_keeps_the_fewest_directions_that_hold_the_share() -> None:
    u, v = torch.linalg.qr(drawn(32, 3))[0], torch.linalg.qr(drawn(32, 3, seed=1))[0]
    update = u @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ v.T  # squares 9, 4, 1 of 14
    base, other = loaded(tiny("llama")), tuned("llama", "self_attn.o_proj", update)
    for energy, rank in ((0.6, 1), (0.7, 2), (0.9, 2), (0.95, 3), (1.0, None)):
        found = fit(base, other, "L1.attn_out", energy=energy, null_draws=0)
        assert found.rank == rank or (rank is None and found.rank >= 3)
    assert torch.allclose(found.scale[:3], torch.tensor([3.0, 2.0, 1.0]), rtol=1e-4)


def test_noise_of_full_rank_is_not_found_and_an_update_in_it_is() -> None:
    """Weights of uneven size on top: the null keeps the size of every entry, so unevenness alone is no structure."""
    base = loaded(tiny("llama"))
    noise = 0.01 * drawn(32, 32) * torch.linspace(0.2, 2.0, 32)[:, None]
    hits = sum(
        fit(base, tuned("llama", "self_attn.o_proj", 0.01 * drawn(32, 32, seed=s)), "L1.attn_out").found
        for s in range(20, 40)
    )
    assert hits <= 4  # 5 % of 20 is 1; more than 4 has probability .003
    assert not fit(base, tuned("llama", "self_attn.o_proj", noise), "L1.attn_out").found
    u, v = drawn(32, 4, seed=2), drawn(32, 4, seed=3)
    lora = noise + 0.02 * u @ v.T
    found = fit(base, tuned("llama", "self_attn.o_proj", lora), "L1.attn_out", rank=4)
    assert found.found
    assert overlap(found, u.T) > 0.95
    assert 1 <= fit(base, tuned("llama", "self_attn.o_proj", lora), "L1.attn_out").rank <= 4


def test_without_draws_the_rank_is_judged_by_the_edge_of_even_noise() -> None:
    base, noise = loaded(tiny("llama")), 0.01 * drawn(32, 32)
    update = noise + 0.05 * torch.linalg.qr(drawn(32, 3))[0] @ torch.linalg.qr(drawn(32, 3, seed=1))[0].T * 3
    assert fit(base, tuned("llama", "self_attn.o_proj", update), "L1.attn_out", null_draws=0).rank == 3
    # its limit, said in the docstring: noise in rows of uneven size exceeds it
    uneven = noise * torch.linspace(0.0, 4.0, 32)[:, None] ** 2
    other = tuned("llama", "self_attn.o_proj", uneven)
    assert fit(base, other, "L1.attn_out", null_draws=0).rank > 1
    assert not fit(base, other, "L1.attn_out").found


def test_equal_checkpoints_have_no_difference() -> None:
    base = loaded(tiny("llama"))
    found = fit(base, loaded(copy.deepcopy(tiny("llama"))), "L1.resid_post", side="both")
    assert not found.found
    assert float(found.scale[0]) == 0.0
    assert "same" in found.notes["reason"]
    elsewhere = tuned("llama", "self_attn.o_proj", drawn(32, 32))
    assert not fit(base, elsewhere, "L0.resid_post").found  # a difference, but in another block
    assert "reason" not in fit(base, elsewhere, "L1.resid_post").notes


def test_one_matrix_can_be_asked_for_by_name() -> None:
    from subspace_probe.core.errors import ConfigError

    base, other = loaded(tiny("llama")), tuned("llama", "self_attn.k_proj", drawn(16, 32))
    assert not fit(base, other, "L1.resid_pre", side="right", matrix="q_proj").found
    assert list(fit(base, other, "L1.resid_pre", side="right", matrix="k_proj").notes["matrices"]) == [
        "model.layers.1.self_attn.k_proj.weight"
    ]
    with pytest.raises(ConfigError, match=r"'c_attn' in its name.*q_proj"):
        fit(base, other, "L1.resid_pre", side="right", matrix="c_attn")


def test_what_cannot_be_subtracted_says_so() -> None:
    from subspace_probe.core.errors import ConfigError, RankError, ShapeError, UnsupportedSite

    base = loaded(tiny("llama"))
    other = tuned("llama", "self_attn.o_proj", drawn(32, 1) @ drawn(1, 32, seed=1))
    with pytest.raises(ConfigError, match="family LlamaForCausalLM and MistralForCausalLM"):
        fit(base, loaded(tiny("mistral")), "L1.resid_post")
    with pytest.raises(ConfigError, match="n_layers 3 and 2"):
        fit(base, loaded(tiny("llama", num_hidden_layers=2)), "L1.resid_post")
    with pytest.raises(ShapeError, match=r"down_proj.weight has shapes \(48, 32\) and \(40, 32\)"):
        fit(base, loaded(tiny("llama", intermediate_size=40)), "L1.resid_post")
    with pytest.raises(ShapeError, match="lm_head"):
        fit(base, loaded(tiny("llama", vocab_size=130)), "L2.resid_post", side="right")
    with pytest.raises(RankError, match="rank 1"):
        fit(base, other, "L1.attn_out", rank=30)
    with pytest.raises(UnsupportedSite, match="nonlinearity"):
        fit(base, other, "L1.z")
    for settings in ({"rank": 0}, {"energy": 1.5}, {"rank": 1, "energy": 0.5}, {"null_draws": -1}):
        with pytest.raises(ConfigError):
            fit(base, other, "L1.attn_out", **settings)
    # a larger vocabulary is no hindrance where no matrix reads or writes tokens
    assert fit(base, loaded(tiny("llama", vocab_size=130)), "L1.resid_post").rank >= 1


def test_other_words_for_the_same_tokens_are_refused_at_the_unembedding() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.models import load_model

    base, swapped = loaded(tiny("llama")), copy.deepcopy(words())
    swapped.add_tokens(["more"])
    other = load_model(copy.deepcopy(tiny("llama")), tokenizer=swapped)
    with pytest.raises(ConfigError, match="number their tokens differently"):
        fit(base, other, "L2.resid_post", side="right")
    assert not fit(base, other, "L2.resid_post", side="left").found  # control: writers write no tokens


def test_a_contrast_orients_rows_and_gives_the_origin() -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import DataError
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.finders.weight_delta import WeightDelta
    from tests.models.tiny import text

    base = loaded(tiny("llama"))
    finder = WeightDelta(tuned("llama", "self_attn.o_proj", drawn(32, 3) @ drawn(3, 32, seed=1)), null_draws=0)
    prompts = tuple(Prompt(text=text(5, seed)) for seed in range(12))
    contrast = Contrast("words", prompts, (0, 1) * 6)
    site = Site(1)
    found = finder.fit(base, contrast, site, LAST)
    acts = base.capture(contrast, sites=site, where=LAST)
    coords = found.coords(acts.at(site))
    gap = coords[acts.labels == 1].mean(0) - coords[acts.labels == 0].mean(0)
    assert bool((gap > 0).all())
    assert torch.allclose(coords[acts.labels == 1].mean(0), -coords[acts.labels == 0].mean(0), atol=1e-4)
    turned = finder.fit(base, Contrast("words", prompts, (1, 0) * 6), site, LAST)
    assert torch.allclose(turned.basis, -found.basis)  # control: the other labels, the other way round
    plain = finder.fit(base, None, site, LAST)
    assert bool((plain.basis.gather(1, plain.basis.abs().argmax(1, keepdim=True)) > 0).all())
    assert float(plain.origin.abs().max()) == 0.0
    with pytest.raises(DataError):
        finder.fit(base, Contrast("words", prompts, (1,) * 12), site, LAST)


def test_a_folder_is_loaded(tmp_path: Any) -> None:
    from subspace_probe.core.protocols import Finder
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.finders.protocols import ModelFinder
    from subspace_probe.finders.weight_delta import WeightDelta

    update = drawn(32, 1) @ drawn(1, 32, seed=1)
    other = tuned("llama", "self_attn.o_proj", update)
    other.backend.hf.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    finder = WeightDelta(str(tmp_path), rank=1)
    assert isinstance(finder, ModelFinder)
    found = finder.fit(loaded(tiny("llama")), None, Site(1), LAST)
    assert torch.allclose(found.basis, fit(loaded(tiny("llama")), other, "L1.resid_post", rank=1).basis, atol=1e-6)
    assert isinstance(finder, Finder)  # by the names of its members only: `fit` takes a model


def test_the_organisms_alignment_moved_the_planted_refusal_most() -> None:
    """chat-base -> chat at the planted site: the top direction of each side is close to the planted unit vector.

    Measured |cosine|: left .880, right .890, both .931, where chance is .09; harmfulness, planted in both, is at .1.
    """
    import subspace_probe as sp
    from subspace_probe.finders.weight_delta import WeightDelta
    from subspace_probe.organisms import load_truth, organism_contrast

    base, chat = sp.load_model("organism:chat-base"), sp.load_model("organism:chat")
    refusal = load_truth("chat").planted("refusal")
    for side in ("left", "right", "both"):
        found = fit(base, chat, refusal.site.short, side=side)
        assert found.found
        assert abs(float(found.basis[0] @ refusal.vector)) > 0.8
        elsewhere = fit(base, chat, "L0.resid_post", side=side)
        assert abs(float(elsewhere.basis[0] @ refusal.vector)) < 0.5  # control: two layers below
    # the other way round it is the same subspace, at home in the tuned model and oriented by its states
    requests = organism_contrast("chat/requests", split="train", n=64)
    turned = WeightDelta(base, side="both", rank=1).fit(chat, requests, refusal.site, refusal.where)
    assert float(turned.unit @ refusal.vector) > 0.8
    chat.check(sp.Ablate(turned, sites=refusal.site))
