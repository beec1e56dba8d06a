"""What users call: prompts in their order, activations of the tokens asked for, interventions that end."""

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.test_chat import tokenizer
from tests.models.test_selftest import chatting
from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.edits import EditMap
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import Where
    from subspace_probe.models.hooked import HookedModel

PROMPTS = [text(length, seed=length) for length in (5, 11, 3, 8, 11)]


def model(family: str = "llama") -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny(family), tokenizer=words())


@dataclass(frozen=True)
class Push:
    """The smallest intervention: add a direction everywhere, at every layer."""

    subspace: "Subspace"
    where: "Where"
    layers: tuple[int, ...] = (0, 1, 2)

    def edits(self, n_layers: int) -> "EditMap":
        from subspace_probe.core.edits import At
        from subspace_probe.core.sites import Site

        vector = self.subspace.vector
        return {Site(layer): At(self.where, lambda x, rows: x + vector.to(x)) for layer in self.layers}

    def parts(self, n_layers: int) -> "list[tuple[Site, Subspace]]":
        return [(site, self.subspace) for site in self.edits(n_layers)]

    def with_subspace(self, subspace: "Subspace") -> "Push":
        return replace(self, subspace=subspace)


def push(*layers: int, seed: int = 0, width: int = 32) -> Push:
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import ALL

    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Push(Subspace.span(3 * vector), ALL, layers or (0, 1, 2))


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


# -------------------------------------------------------------------------------------------------------------- capture
def test_rows_come_in_the_order_of_the_prompts() -> None:
    from subspace_probe.core.sites import Site, resid_post

    subject = model()
    acts = subject.capture(PROMPTS, sites=resid_post(), where="last")
    assert acts.prompt.tolist() == [0, 1, 2, 3, 4]
    assert acts.position.tolist() == [4, 10, 2, 7, 10]
    assert acts.sites == (Site(0), Site(1), Site(2))
    for row, prompt in enumerate(PROMPTS):
        alone = subject.backend.run(subject.tokens(prompt), reads=[Site(1)]).reads[Site(1)]
        assert close(acts.at(Site(1))[row], alone[0, -1])


@pytest.mark.parametrize("budget", [1, 12, 30, 8192])
def test_how_prompts_are_batched_changes_nothing(budget: int) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL

    subject = model()
    acts = subject.capture(PROMPTS, sites="L1.attn_out", where=ALL, batch_tokens=budget)
    assert acts.prompt.tolist() == [row for row, length in enumerate((5, 11, 3, 8, 11)) for _ in range(length)]
    assert acts.position.tolist() == [p for length in (5, 11, 3, 8, 11) for p in range(length)]
    whole = subject.capture(PROMPTS, sites="L1.attn_out", where=ALL)
    assert close(acts.at(Site(1, "attn_out")), whole.at(Site(1, "attn_out")))
    assert close(subject.logits(PROMPTS, batch_tokens=budget), subject.logits(PROMPTS))
    made = subject.generate(PROMPTS, max_new_tokens=4, batch_tokens=budget)
    assert (
        made
        == subject.generate(PROMPTS, max_new_tokens=4)
        == [subject.generate(p, max_new_tokens=4)[0] for p in PROMPTS]
    )


def test_a_contrast_keeps_its_labels() -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt

    subject = model()
    contrast = Contrast("pairs", tuple(map(Prompt, PROMPTS[:4])), (1, 0, 1, 0), pairs=(7, 7, 9, 9))
    acts = subject.capture(contrast, sites="L0.resid_post")
    assert (acts.labels.tolist(), acts.pairs.tolist()) == ([1, 0, 1, 0], [7, 7, 9, 9])
    assert acts.contrast is contrast
    assert {
        "model": subject.spec.name,
        "fingerprint": subject.fingerprint,
        "data": "pairs",
    }.items() <= acts.notes.items()
    assert acts.notes == subject.provenance(contrast)
    relabelled = Contrast("pairs", contrast.prompts, (0, 1, 0, 1), pairs=contrast.pairs)
    assert subject.provenance(relabelled)["data_hash"] != acts.notes["data_hash"]


def test_sites_of_every_kind_and_an_encoder() -> None:
    from subspace_probe.core.sites import Site

    acts = model("qwen3").capture(PROMPTS, sites=[Site(-1, "z"), Site(0, "z", 2), Site(1, "mlp_post")])
    assert {site.short: acts.at(site).shape[1] for site in acts.sites} == {"L0.z.h2": 12, "L1.mlp_post": 48, "L2.z": 48}
    encoder = model("bert").capture(PROMPTS, sites="resid_mid", where="all")
    assert encoder.rows.n == 38


def test_capturing_under_an_intervention_at_deeper_layers_too() -> None:
    from subspace_probe.core.sites import Site

    subject = model()
    acts = subject.capture(PROMPTS, sites="L1.resid_post", interventions=[push()])
    only = subject.capture(PROMPTS, sites="L1.resid_post", interventions=[push(0, 1)])
    assert torch.equal(acts.at(Site(1)), only.at(Site(1)))
    assert not close(acts.at(Site(1)), subject.capture(PROMPTS, sites="L1.resid_post").at(Site(1)))


def test_what_cannot_be_captured_is_named() -> None:
    from subspace_probe.core.errors import DataError, PositionError, SiteError, UnknownName

    subject = model()
    for kind, why, kw in [
        (SiteError, "3 layers", {"sites": "L3.resid_post"}),
        (UnknownName, "Did you mean 'resid_post'", {"sites": "resid_pos"}),
        (UnknownName, "Unknown position 'lats'", {"where": "lats"}),
        (PositionError, "no chat template", {"where": "t_inst"}),
        (PositionError, "is too short", {"where": "at+3"}),
        (PositionError, "No token of these prompts is 'generated'", {"where": "generated"}),
        (PositionError, "does not occur in prompt", {"where": "span:nowhere"}),
    ]:
        with pytest.raises(kind, match=why):
            subject.capture(PROMPTS, **kw)
    with pytest.raises(DataError, match=r"1 prompts are longer than the model's context of 64 tokens; .* prompt 1"):
        subject.capture([*PROMPTS[:1], text(65, 0)])


# --------------------------------------------------------------------------------------------------- logits, generation
def test_last_token_logits_are_the_models_own() -> None:
    subject = model("gpt2")
    logits = subject.logits(PROMPTS)
    assert logits.shape == (5, 128)
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            own = subject.backend.hf(words()(prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
            assert close(logits[row], own)
            assert subject.logits(prompt).shape == (1, 128)


def test_generated_texts_are_the_models_own_greedy_ones() -> None:
    from transformers import GenerationConfig

    subject = model("qwen2")
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    for prompt, made in zip(PROMPTS, subject.generate(PROMPTS, max_new_tokens=6), strict=True):
        ids = words()(prompt, return_tensors="pt")
        own = subject.backend.hf.generate(
            ids["input_ids"], attention_mask=ids["attention_mask"], generation_config=greedy
        )
        assert made == words().decode(own[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_encoder_has_no_next_token() -> None:
    from subspace_probe.core.errors import ConfigError

    for call in (model("bert").logits, model("bert").generate):
        with pytest.raises(ConfigError, match="is an encoder"):
            call(PROMPTS)


# -------------------------------------------------------------------------------------------------------- interventions
def test_an_intervention_stands_while_the_block_lasts() -> None:
    subject = model()
    plain, texts = subject.logits(PROMPTS), subject.generate(PROMPTS, max_new_tokens=4)
    once = subject.logits(PROMPTS, interventions=[push()])
    assert not close(once, plain)
    with subject.intervened(push()) as edited:
        assert torch.equal(edited.logits(PROMPTS), once)
        assert edited.generate(PROMPTS, max_new_tokens=4) == subject.generate(
            PROMPTS, interventions=[push()], max_new_tokens=4
        )
        captured = edited.capture(PROMPTS, sites="L2.resid_post").rows
        assert torch.equal(
            captured.read(captured.sites[0], 0, 5),
            subject.capture(PROMPTS, sites="L2.resid_post", interventions=[push()]).at(captured.sites[0]),
        )
        assert torch.equal(subject.logits(PROMPTS), plain)  # the model it came from is left as it is
    assert torch.equal(subject.logits(PROMPTS), plain)
    assert subject.generate(PROMPTS, max_new_tokens=4) == texts != edited.generate(PROMPTS, max_new_tokens=4)


def test_interventions_add_up() -> None:
    subject, one, two = model(), push(seed=1), push(1, seed=2)
    both = subject.logits(PROMPTS, interventions=[one, two])
    assert not close(both, subject.logits(PROMPTS, interventions=[one]))
    with subject.intervened(one) as edited:
        assert torch.equal(edited.logits(PROMPTS, interventions=[two]), both)
        with edited.intervened(two) as twice:
            assert torch.equal(twice.logits(PROMPTS), both)
            shown = twice.tokens(PROMPTS)
            continued = twice.run(shown, prefix=twice.prefix(shown, 1), logits_to_keep=1).logits
            assert continued is not None
            assert close(continued[:, -1], both)


def test_a_direction_of_another_width_is_refused_before_anything_runs() -> None:
    from subspace_probe.core.errors import ShapeError

    for call in (model().logits, model().generate, model().capture):
        with pytest.raises(ShapeError, match="width 31 was used where the activations have width 32"):
            call(PROMPTS, interventions=[push(width=31)])


# ------------------------------------------------------------------------------------------------------------- identity
def test_the_fingerprint_is_of_weights_vocabulary_and_template() -> None:
    from subspace_probe.models import load_model

    first = chatting("chatml").fingerprint
    assert chatting("chatml").fingerprint == first
    assert chatting("chatml").named("other").fingerprint == first
    assert chatting("llama3").fingerprint != first
    options = {"template_kwargs": {"enable_thinking": False}}
    hf = chatting("chatml").backend.hf
    assert load_model(hf, tokenizer=tokenizer("chatml"), **options).fingerprint != first
    changed = copy.deepcopy(hf)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert load_model(changed, tokenizer=tokenizer("chatml")).fingerprint != first
    counting = copy.deepcopy(hf)
    counting.register_buffer("count", torch.tensor(3))  # a number, without an axis
    assert load_model(counting, tokenizer=tokenizer("chatml")).fingerprint != first
    longer = tokenizer("chatml")
    longer.add_tokens(["new"])
    assert load_model(hf, tokenizer=longer).fingerprint != first
    assert load_model(copy.deepcopy(hf).to(torch.bfloat16), tokenizer=tokenizer("chatml")).fingerprint != first


def test_wrapping_and_using_a_model_leaves_it_and_its_tokenizer_alone() -> None:
    from subspace_probe.models import load_model

    hf, reader = chatting("chatml").backend.hf, tokenizer("chatml")
    reader.padding_side = "right"
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    settings = (reader.padding_side, reader.truncation_side, reader.chat_template, dict(reader.get_vocab()))
    subject = load_model(hf, tokenizer=reader)
    subject.generate(["Why", "How are you?"], interventions=[push()], max_new_tokens=3)
    subject.capture(["Why", "How are you?"], where="t_inst")
    assert subject.backend.hf is hf
    assert hf.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())
    assert settings == (reader.padding_side, reader.truncation_side, reader.chat_template, dict(reader.get_vocab()))
    assert not hf.training


# ---------------------------------------------------------------------------------------------------------------- words
def test_words_become_the_tokens_an_answer_would_begin_with() -> None:
    from subspace_probe.core.errors import ConfigError

    subject = model()
    assert subject.token_ids(["w7", " w9 w3"]) == [7, 9]
    with pytest.raises(ConfigError, match="no token for 'unheard'"):
        subject.token_ids(["unheard"])
    chatty = chatting("chatml")
    assert chatty.tokenizer.decode(chatty.token_ids(["Stop"])) == chatty.tokenizer.decode(
        chatty.tokenizer("Stop")["input_ids"][1:2]
    )
    known = type(subject)(subject.backend, words(), words={"refusal": ["w4", "w5"]})
    assert known.behaviour_ids("refusal") == [4, 5]
    with pytest.raises(ConfigError, match=r"'harmful' is not known .*--words harmful="):
        known.behaviour_ids("harmful")


def test_stories_continue_sensibly(stories: "HookedModel") -> None:
    """A real checkpoint: it was trained on stories, so after a girl's name comes her pronoun."""
    made = stories.generate("Once upon a time, there was a little girl named Lily.", max_new_tokens=3)
    assert made[0].startswith("She")
    she, he = stories.token_ids(["She", "He"])
    logits = stories.logits(
        ["Once upon a time, there was a little girl named Lily.", "One day, a boy named Tom was sad."]
    )
    assert logits[0, she] > logits[0, he]
    assert logits[1, he] > logits[1, she]


def test_turns_alternate() -> None:
    from subspace_probe.models.chat import chat

    made: Any = chat("a", "b", "c", system="s").messages
    assert [turn["role"] for turn in made] == ["system", "user", "assistant", "user"]
    assert [turn["content"] for turn in made] == ["s", "a", "b", "c"]
