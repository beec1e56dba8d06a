"""Ways in which rows could be those of something else without an error. Each was one once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import batch, text, tiny, words

PROMPTS = [text(3 + i % 5, seed=i) for i in range(6)]


def load(hf: Any = None, **kw: Any) -> Any:
    from subspace_probe.models import load_model

    return load_model(copy.deepcopy(tiny("llama")) if hf is None else hf, tokenizer=copy.deepcopy(words()), **kw)


def halve(model: Any) -> None:
    model.backend.hf.model.layers[0].mlp.down_proj.weight.data.mul_(0.5)  # leaves no trace but the numbers


def another_epsilon(model: Any) -> None:
    model.backend.hf.config.rms_norm_eps = 0.1


def lower_case(model: Any) -> None:
    from tokenizers.normalizers import Replace

    model.tokenizer.backend_tokenizer.normalizer = Replace("w5", "w6")


@pytest.mark.parametrize(("change", "what"), [(halve, "model"), (another_epsilon, "model"), (lower_case, "tokens")])
def test_a_folder_is_of_the_model_and_the_tokens_as_they_are_now(change: Any, what: str, tmp_path: Path) -> None:
    from subspace_probe.core.errors import StaleStore
    from subspace_probe.core.sites import Site
    from subspace_probe.store import Folder

    model = load()
    prompts = [*PROMPTS, "w5 w9 w5"]
    model.capture(prompts, sites=Site(1), into=Folder(tmp_path / "acts"))
    change(model)
    with pytest.raises(StaleStore, match=f"its {what} differ"):
        model.capture(prompts, sites=Site(1), into=Folder(tmp_path / "acts"))


def test_an_interrupted_capture_is_not_gone_on_with_by_another_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_probe.core.errors import StaleStore
    from subspace_probe.models import capturing
    from subspace_probe.store import Folder

    monkeypatch.setattr(capturing, "PART_BYTES", 500)
    model = load()
    model.capture(PROMPTS, where="all", batch_tokens=8, into=Folder(tmp_path / "acts"))
    (tmp_path / "acts/shard-00001.safetensors").unlink()
    with pytest.raises(StaleStore, match="made with other backend;"):
        load(backend="nnsight").capture(PROMPTS, where="all", batch_tokens=8, into=Folder(tmp_path / "acts"))
    passes = list[int]()
    run = model.backend.run
    model.backend.run = lambda shown, **kw: (passes.append(shown.size), run(shown, **kw))[1]
    model.capture(PROMPTS, where="all", batch_tokens=8, into=Folder(tmp_path / "acts"))
    assert 0 < sum(passes) < len(PROMPTS)  # only what is missing is computed


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's, of transformers
def test_adapters_of_other_strength_are_another_model() -> None:
    peft = pytest.importorskip("peft")
    prints = set[str]()
    for alpha in (8, 64):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            settings = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["o_proj"], init_lora_weights=False)
            prints.add(load(peft.get_peft_model(copy.deepcopy(tiny("llama")), settings).eval()).fingerprint)
    assert len(prints) == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_learned_prompts_are_refused() -> None:
    peft = pytest.importorskip("peft")
    from subspace_probe.core.errors import BackendError

    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(BackendError, match="learned prompt"):
        load(peft.get_peft_model(copy.deepcopy(tiny("llama")), settings).eval())


@pytest.mark.parametrize("backend", ["native", "transformer_lens", "nnsight"])
def test_what_is_put_into_the_users_model_is_what_runs(backend: str) -> None:
    from subspace_probe.core.sites import Site

    model = load(backend=backend)
    before = model.capture(PROMPTS, sites=Site(1)).at(Site(1))
    down = model.backend.hf.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(torch.zeros_like(down.weight))
    after = model.capture(PROMPTS, sites=Site(1)).at(Site(1))
    wanted = load(model.backend.hf).capture(PROMPTS, sites=Site(1)).at(Site(1))
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(after, wanted, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "transformer_lens", "nnsight"])
def test_an_edit_may_run_a_pass_of_its_own(backend: str) -> None:
    from subspace_probe.core.sites import Site

    model, shown = load(backend=backend), batch(6, 3)
    inner = model.run(shown, reads=[Site(1)]).reads[Site(1)]
    outer = model.run(
        shown, reads=[Site(1)], writes={Site(1): lambda x, ctx: x + model.run(shown, reads=[Site(1)]).reads[Site(1)]}
    )
    assert torch.allclose(outer.reads[Site(1)], 2 * inner, atol=1e-4)


def test_a_model_put_into_training_mode_or_compiled_is_refused() -> None:
    from subspace_probe.core.errors import BackendError

    model = load()
    model.backend.hf.train()
    with pytest.raises(BackendError, match="training mode"):
        model.capture(PROMPTS)
    model.backend.hf.eval()
    model.backend.hf.compile(backend="eager")
    with pytest.raises(BackendError, match="compiled"):
        load(model.backend.hf)


def test_nan_is_no_agreement() -> None:
    from subspace_probe.models.comparing import _difference

    for bad in (float("nan"), float("inf")):
        assert _difference(torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0])) == float("inf")


def test_rows_that_overflow_their_dtype_are_refused() -> None:
    from subspace_probe.core.errors import ConfigError, ShapeError
    from subspace_probe.core.sites import Site

    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight.mul_(1e5)
    model = load(hf)
    with pytest.raises(ShapeError, match="not finite in float16"):
        model.capture(PROMPTS, sites=Site(1), dtype=torch.float16)
    model.capture(PROMPTS, sites=Site(1), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8 was given"):
        model.capture(PROMPTS, dtype=torch.int8)


def test_other_kinds_of_things_are_refused_in_words() -> None:
    from subspace_probe.core.captures import Memory
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.tokens import LAST
    from subspace_probe.models.hooked import _require_kinds

    _require_kinds(LAST, Memory(), torch.bfloat16)
    for wrong in ((3, Memory(), None), (LAST, "acts", None), (LAST, Memory(), "bfloat16")):
        with pytest.raises(ConfigError, match="was given"):
            _require_kinds(*wrong)


def test_heads_have_one_order_and_sites_may_be_named(tmp_path: Path) -> None:
    from subspace_probe.core.sites import Site, resolve_sites

    heads = [Site(1, "z", i) for i in (3, 1, 0, 2)]
    assert resolve_sites([*heads, Site(1, "z")], 3) == (Site(1, "z"), *(Site(1, "z", i) for i in range(4)))
    assert resolve_sites(["L1.attn_out", "resid_pre"], 2) == (
        Site(0, "resid_pre"),
        Site(1, "resid_pre"),
        Site(1, "attn_out"),
    )


def test_what_was_written_is_what_is_read_again(tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.store import Folder, open_activations

    prompts = (Prompt(text="w3 w4 w3", instruction="w3", start=0), Prompt(text="w5", raw=True, answer=""))
    acts = load().capture(Contrast("c", prompts, (0, 1)), into=Folder(tmp_path / "acts"))
    again = open_activations(tmp_path / "acts")
    assert again.contrast.prompts == prompts
    assert again.where_prompts(acts.contrast.take([1])).rows.n == 1


def test_an_intervention_with_hidden_state_has_no_key() -> None:
    from dataclasses import dataclass

    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.keys import content_key

    @dataclass
    class Hiding:
        shown: int

        def __post_init__(self) -> None:
            self.hidden = 2 * self.shown

    with pytest.raises(ConfigError, match="keeps hidden outside its fields"):
        content_key(Hiding(1))
