"""What large models need: adapters, offloaded and quantised weights, all read like any other."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel

PROMPTS = [text(3 + i % 5, seed=i) for i in range(6)]


def hidden(hf: Any, model: "HookedModel", layer: int) -> torch.Tensor:
    """Transformers' own states of the last tokens behind a block."""
    batch = model.tokens(PROMPTS)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "position_ids": batch.positions}
    with torch.no_grad():
        return hf(**inputs, output_hidden_states=True).hidden_states[layer + 1][:, -1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's, of transformers
def test_adapters_act_and_count(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from subspace_probe.core.errors import StaleStore
    from subspace_probe.core.sites import Site
    from subspace_probe.models import load_model
    from subspace_probe.store import Folder

    plain = load_model(tiny("llama"), tokenizer=words())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(copy.deepcopy(tiny("llama")), settings).eval()
    model = load_model(adapted, tokenizer=words())
    assert (model.spec.d_head, model.backend.width(Site(1, "mlp_post"))) == (8, 48)
    found = model.capture(PROMPTS, sites=Site(1), into=Folder(tmp_path / "acts")).at(Site(1))
    assert torch.equal(found, hidden(adapted, model, 1))
    assert not torch.allclose(found, plain.capture(PROMPTS, sites=Site(1)).at(Site(1)), atol=1e-2)
    on = model.fingerprint
    with adapted.disable_adapter():
        off = model.capture(PROMPTS, sites=Site(1)).at(Site(1))
        assert model.fingerprint != on
        with pytest.raises(StaleStore, match="its model differ"):
            model.capture(PROMPTS, sites=Site(1), into=Folder(tmp_path / "acts"))
    assert torch.equal(off, plain.capture(PROMPTS, sites=Site(1)).at(Site(1)))
    assert model.fingerprint == on


def test_offloaded_weights_are_fetched(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    from subspace_probe.core.sites import Site
    from subspace_probe.models import load_model

    plain = load_model(tiny("gpt2"), tokenizer=words())
    places = {"transformer.wte": "disk", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "disk"}
    places |= {f"transformer.h.{i}": place for i, place in enumerate(("cpu", "disk", "cpu"))}
    hf = copy.deepcopy(tiny("gpt2"))
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())  # tied weights cannot go to disk
    dispatch_model(hf, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert hf.transformer.h[1].mlp.c_fc.weight.is_meta
    model = load_model(hf, tokenizer=words())
    assert model.backend.device.type == "cpu"
    for site in (Site(1), Site(2), Site(1, "z")):
        found, wanted = (each.capture(PROMPTS, sites=site).at(site) for each in (model, plain))
        assert torch.equal(found, wanted)
    assert torch.equal(model.logits(PROMPTS), plain.logits(PROMPTS))
    assert torch.equal(model.backend.unembedding(), plain.backend.unembedding())
    in_memory = copy.deepcopy(tiny("gpt2"))
    in_memory.lm_head.weight = torch.nn.Parameter(in_memory.lm_head.weight.detach().clone())
    assert model.fingerprint == load_model(in_memory, tokenizer=words()).fingerprint


def test_a_fingerprint_follows_the_weights() -> None:
    from subspace_probe.models import load_model

    hf = copy.deepcopy(tiny("llama"))
    model = load_model(hf, tokenizer=words())
    first = model.fingerprint
    assert model.fingerprint == first == load_model(copy.deepcopy(hf), tokenizer=words()).fingerprint
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    second = model.fingerprint
    hf.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 48))
    assert len({first, second, model.fingerprint}) == 3


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_models_are_read_like_any_other(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from subspace_probe.core.sites import Site
    from subspace_probe.models import load_model

    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = load_model(tmp_path, quantization_config=settings, device_map="cpu", dtype=torch.float32)
    assert (model.spec.d_head, model.backend.width(Site(1, "mlp_post"))) == (16, 128)
    before = model.fingerprint
    found = model.capture(PROMPTS, sites=Site(1)).at(Site(1))
    assert torch.equal(found, hidden(model.backend.hf, model, 1))
    assert torch.equal(found, model.capture(PROMPTS, sites=Site(1)).at(Site(1)))
    assert model.fingerprint == before
