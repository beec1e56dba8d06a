"""The layer search against exhaustive search, planted layers and read-outs that are made up; patchscopes by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.interventions.layer_search import LayerSearch
    from subspace_probe.models.hooked import HookedModel

DEEP = 12


@cache
def deep() -> "HookedModel":
    """Twelve layers, for read-outs that are made up."""
    from subspace_probe.models import load_model

    return load_model(tiny("gpt2", num_hidden_layers=DEEP), tokenizer=words())


def answered(*answers: str, seed: int = 0) -> "list[Prompt]":
    from subspace_probe.core.prompts import Prompt

    return [Prompt(text=text(4 + i, seed + i), answer=answer) for i, answer in enumerate(answers)]


@dataclass(frozen=True)
class MadeUp:
    """A read-out whose probabilities are a function of the layers patched: rows [depth] of p(source), p(target)."""

    rule: Callable[[tuple[int, ...]], tuple[list[float], list[float]]]

    def __call__(self, model: Any, prompts: Sequence[Any], conditions: Sequence[Any]) -> Tensor:
        rows = [self.rule(tuple(s.layer for s in c.source.sites) if c else ()) for c in conditions]
        return torch.tensor(rows).transpose(1, 2)[..., None].expand(-1, -1, -1, len(prompts))


def made_up(rule: Callable[[tuple[int, ...]], Any], **settings: Any) -> "LayerSearch":
    from subspace_probe.interventions.layer_search import search_layers

    return search_layers(deep(), answered("w5", "w6"), answered("w7", "w8"), readout=MadeUp(rule), **settings)


def needing(*needed: int) -> Callable[[tuple[int, ...]], Any]:
    """The answer is the source's once all these layers are patched."""
    return lambda layers: ([0.9], [0.1]) if {*needed} <= {*layers} else ([0.2], [0.8])


# ------------------------------------------------------------------------------------------------------ made-up answers
@pytest.mark.parametrize("needed", [(0,), (5,), (11,), (2, 9), (4, 5, 6), tuple(range(DEEP))])
def test_finds_the_range_in_few_runs(needed: tuple[int, ...]) -> None:
    found = made_up(needing(*needed), scan_up_to=0)
    assert (found.start, found.stop) == (needed[0], needed[-1] + 1)
    assert found.layers == tuple(range(needed[0], needed[-1] + 1))
    assert not found.added
    assert found.runs <= 1 + 2 * math.ceil(math.log2(DEEP)) < DEEP
    assert (found.monotone, found.scan_runs) == (None, 0)
    scanned = made_up(needing(*needed))
    assert scanned.monotone is True
    assert scanned.exceptions == ()
    assert scanned.runs == found.runs  # what checking costs is counted apart
    assert scanned.runs + scanned.scan_runs >= DEEP
    assert [float(v) for v in (found.source, found.target)] == pytest.approx([0.9, 0.1])
    assert [float(v) for v in (found.clean_source, found.clean_target)] == pytest.approx([0.2, 0.8])


def test_what_is_not_monotone_is_reported() -> None:
    """[0, 3) suffices and [0, 4) to [0, 6) do not: binary search does not see it, the scan does and says where."""

    def rule(layers: tuple[int, ...]) -> Any:
        if layers and layers[0] == 0:
            return ([0.9], [0.1]) if len(layers) == 3 or len(layers) >= 7 else ([0.2], [0.8])
        return ([0.9], [0.1]) if layers == (4, 5, 6) else ([0.2], [0.8])

    found = made_up(rule)
    assert (found.start, found.stop, found.monotone) == (4, 7, False)
    reached = {(0, b): rule(tuple(range(b)))[0][0] > 0.85 for b in range(1, DEEP + 1)}
    reached |= {(a, 7): rule(tuple(range(a, 7)))[0][0] > 0.85 for a in range(1, 7)}
    wrong = [r for r, yes in reached.items() if yes != (r[1] >= 7 if r[0] == 0 else r[0] <= 4)]
    assert list(found.exceptions) == wrong
    assert (0, 3) in wrong
    assert "not monotone at [(0, 3)" in repr(found)
    assert made_up(rule, scan_up_to=DEEP - 1).monotone is None


def test_a_threshold_that_is_never_reached_is_a_result() -> None:
    found = made_up(lambda layers: ([0.1 + 0.06 * len(layers)], [0.7]))
    assert not found.reached
    assert found.layers == ()
    assert found.sites == ()
    assert (found.start, found.stop, found.added, found.separated) == (None, None, (), False)
    assert found.runs == 1
    assert found.monotone is True
    assert float(found.source) == pytest.approx(0.1 + 0.06 * DEEP)  # with all layers patched
    assert "never reached" in repr(found)
    assert made_up(lambda layers: ([0.1 + 0.06 * len(layers)], [0.5]), threshold=0.8).stop == DEEP  # control
    hidden = made_up(lambda layers: ([0.9 if len(layers) == 5 else 0.1], [0.5]))
    assert not hidden.reached
    assert hidden.monotone is False
    assert hidden.exceptions == ((0, 5),)


def test_an_answer_that_is_the_sources_already_needs_nothing() -> None:
    found = made_up(lambda layers: ([0.9], [0.05]))
    assert found.reached
    assert found.layers == ()
    assert (found.start, found.stop) == (0, 0)
    assert found.runs == 0
    assert found.monotone is True


def _relapsing(*relapses: int, needed: int = 3) -> Callable[[tuple[int, ...]], Any]:
    """Layer 3 brings the source's answer; each of the relapses takes .3 of it back, unless it is patched."""

    def rule(layers: tuple[int, ...]) -> Any:
        source, target, now = [], [], 0.02
        for depth in range(DEEP):
            if depth == needed and needed in layers:
                now = 0.95
            if depth in relapses and depth not in layers and now > 0.3:
                now -= 0.3
            source.append(now)
            target.append(1 - now)
        return source, target

    return rule


def test_refinement_adds_the_layers_that_write_the_targets_answer_again() -> None:
    found = made_up(_relapsing(6, 10), eps=0.25)
    assert (found.start, found.stop, found.added) == (3, 4, (6,))  # .65 leads .35 by more than that
    found = made_up(_relapsing(6, 10), eps=0.35)
    assert (found.start, found.stop, found.added, found.layers) == (3, 4, (6, 10), (3, 6, 10))
    assert found.separated
    assert float(found.source[-1]) == pytest.approx(0.95)
    plain = made_up(_relapsing())
    assert plain.added == ()
    assert found.runs == plain.runs + 2
    assert made_up(_relapsing(6, 10), eps=0.35, phi=0.31).added == ()  # control: falls by .3 are not looked at


def test_refinement_ends_though_nothing_helps() -> None:
    """Every layer loses some, whatever is patched: each later layer is added once, or as many as are allowed."""

    def falling(layers: tuple[int, ...]) -> Any:
        top = 0.95 if 2 in layers else 0.1
        return [0.0] * 2 + [max(top - 0.08 * i, 0.0) for i in range(DEEP - 2)], [0.9] * DEEP

    found = made_up(falling)
    assert found.added == tuple(range(3, DEEP))
    assert not found.separated
    assert made_up(falling, max_added=2).added == (3, 4)
    assert made_up(falling, max_added=0).added == ()


# --------------------------------------------------------------------------------------------------------- real answers
def planted(*layers: int) -> "tuple[HookedModel, list[Prompt], list[Prompt]]":
    """Only the attention of these layers writes anything, so only theirs can carry what earlier tokens say.

    Prompts end in the same word, and their answers are what the model itself says, made certain by a large final gain.
    """
    from copy import deepcopy

    from subspace_probe.core.prompts import Prompt
    from subspace_probe.models import load_model

    hf = deepcopy(tiny("gpt2", num_hidden_layers=DEEP))
    with torch.no_grad():
        for index, block in enumerate(hf.transformer.h):
            for linear in [block.mlp.c_proj, *([] if index in layers else [block.attn.c_proj])]:
                linear.weight.zero_()
                linear.bias.zero_()
        hf.transformer.ln_f.weight.mul_(30)
    model = load_model(hf, tokenizer=words())
    texts = [f"{text(5, seed)} w9" for seed in range(24)]
    said = model.logits(texts).argmax(-1).tolist()
    prompts = [Prompt(text=shown, answer=f"w{word}") for shown, word in zip(texts, said, strict=True) if word > 2]
    pairs = [(a, b) for a, b in zip(prompts[::2], prompts[1::2], strict=False) if a.answer != b.answer]
    assert len(pairs) >= 4
    return model, [a for a, _ in pairs], [b for _, b in pairs]


def test_finds_a_planted_layer() -> None:
    from subspace_probe.interventions.layer_search import search_layers
    from subspace_probe.interventions.patchscope import FinalProbability

    model, sources, targets = planted(7)
    settings: dict[str, Any] = {"readout": FinalProbability(), "threshold": 0.7}
    found = search_layers(model, sources, targets, **settings)
    assert found.layers == (7,)
    assert found.monotone is True
    assert found.runs < DEEP
    silent = search_layers(model, sources, targets, **settings, stream="mlp_out", scan_up_to=0)
    assert not silent.reached  # control: MLPs say nothing


def _contrast_of(setting: str) -> "tuple[list[Prompt], list[Prompt]]":
    import subspace_probe as sp

    knob = sp.load_contrast("organism:chat/knob", n=12)
    prior, context = ([p for p, y in zip(knob.prompts, knob.labels, strict=True) if y == label] for label in (0, 1))
    if setting in ("CP", "PC"):
        return (context, prior) if setting == "CP" else (prior, context)
    same = prior if setting == "PRIOR" else context
    pairs = [(a, b) for a, b in zip(same[1:] + same[:1], same, strict=True) if a.answer != b.answer]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _naive(model: "HookedModel", source: "Prompt", target: "Prompt") -> dict[tuple[int, int], float]:
    """Probability of the source's answer for every range of layers, by plain hooks on the user's own model."""
    hf, kept, table = model.backend.hf, dict[int, Tensor](), dict[tuple[int, int], float]()
    attentions = [block.self_attn for block in hf.model.layers]
    token = model.token_ids([source.answer or ""])[0]

    def keep(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[index] = output[0][0, -1]

        return hook

    def put(index: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            changed = output[0].clone()
            changed[0, -1] = kept[index]
            return (changed, *output[1:])

        return hook

    def run(prompt: "Prompt", hooks: dict[int, Callable[..., Any]]) -> Tensor:
        handles = [attentions[index].register_forward_hook(hook) for index, hook in hooks.items()]
        with torch.no_grad():
            logits = hf(input_ids=model.tokens([prompt]).ids).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits

    run(source, {index: keep(index) for index in range(len(attentions))})
    for stop in range(1, len(attentions) + 1):
        for start in range(stop):
            logits = run(target, {index: put(index) for index in range(start, stop)})
            table[start, stop] = float(logits.softmax(-1)[token])
    return table


@pytest.mark.parametrize("setting", ["CP", "CTX"])
def test_equals_an_exhaustive_search(chat: "HookedModel", setting: str) -> None:
    """Of all ranges of the chat organism's layers, the one with the smallest end, and of these the latest start."""
    from subspace_probe.interventions.layer_search import search_layers
    from subspace_probe.interventions.patchscope import FinalProbability

    sources, targets = _contrast_of(setting)
    found = search_layers(chat, sources, targets, readout=FinalProbability())
    tables = [_naive(chat, source, target) for source, target in zip(sources, targets, strict=True)]
    table = {bounds: sum(one[bounds] for one in tables) / len(tables) for bounds in tables[0]}
    stop = min(b for a, b in table if a == 0 and table[0, b] > 0.85)
    start = max(a for a, b in table if b == stop and table[a, b] > 0.85)
    assert (found.start, found.stop, found.monotone) == (start, stop, True)
    assert float(found.source[-1]) == pytest.approx(table[start, stop], abs=1e-4)
    assert float(found.clean_source[-1]) < 0.5  # control: without a patch the answer is the target's own
    assert found.separated


def test_intent_is_taken_up_later_than_the_answer_is_read(chat: "HookedModel") -> None:
    """In the chat organism intent is planted at layer 2, and that layer's attention is what must be exchanged."""
    from subspace_probe.interventions.layer_search import search_layers

    found = search_layers(chat, *_contrast_of("CP"))
    assert 2 in found.layers
    assert 0 not in found.layers
    assert len(found.source) == chat.spec.n_layers
    assert 0 in search_layers(chat, *_contrast_of("PRIOR")).layers  # control: another question, earlier layers


# ---------------------------------------------------------------------------------------------------------- patchscopes
def test_token_identity_equals_plain_hooks(chat: "HookedModel") -> None:
    from subspace_probe.interventions.patchscope import TokenIdentity, identity_prompt

    shown = [replace(p, answer=p.answer, foil=p.foil) for p in _contrast_of("CP")[1][:2]]
    found = TokenIdentity()(chat, shown, [None])
    assert found.shape == (1, 4, 2, 2)
    hf, identity = chat.backend.hf, identity_prompt(chat, avoid=[w for p in shown for w in (p.answer, p.foil) if w])
    ids = chat.tokens([identity]).ids
    for row, prompt in enumerate(shown):
        tokens = chat.token_ids([prompt.answer or "", prompt.foil or ""])
        for layer in range(4):
            kept: list[Tensor] = []

            def keep(module: Any, args: Any, output: Any) -> None:
                kept.append(output[0, -1] if isinstance(output, Tensor) else output[0][0, -1])  # noqa: B023

            def put(module: Any, args: Any, output: Any) -> Any:
                changed = (output if isinstance(output, Tensor) else output[0]).clone()
                changed[0, -1] = kept[0]  # noqa: B023
                return changed if isinstance(output, Tensor) else (changed, *output[1:])

            with torch.no_grad():
                handle = hf.model.layers[layer].register_forward_hook(keep)
                hf(input_ids=chat.tokens([prompt]).ids)
                handle.remove()
                handle = hf.model.layers[layer].register_forward_hook(put)
                wanted = hf(input_ids=ids).logits[0, -1].softmax(-1)[tokens]
                handle.remove()
            assert torch.allclose(found[0, layer, :, row].float(), wanted, atol=1e-4)


def test_the_last_layers_patchscope_is_the_output(chat: "HookedModel") -> None:
    """From the last state on there is nothing but the unembedding, whatever the prompt."""
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.interventions.patchscope import FinalProbability, TokenIdentity

    shown = _contrast_of("CP")[1]
    final, scoped = (read(chat, shown, [None])[0] for read in (FinalProbability(), TokenIdentity()))
    other = TokenIdentity(Prompt(text="repeat : ring"))(chat, shown, [None])[0]
    assert torch.allclose(final[0], scoped[-1], atol=1e-5)
    assert torch.allclose(final[0], other[-1], atol=1e-5)
    assert not torch.allclose(final[0], scoped[1], atol=1e-2)  # control
    assert not torch.allclose(scoped[1], other[1], atol=1e-2)
    # a word that is there can be read: in the middle the prior's answer, at the output too
    assert float(scoped[2, 1].mean()) < 0.5 < float(scoped[2, 0].mean())


def test_identity_prompts_are_made_of_the_models_words(chat: "HookedModel") -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.patchscope import identity_prompt

    prompt = identity_prompt(chat, n_words=3)
    assert prompt.raw
    assert prompt.text.endswith("?")
    assert chat.tokenizer.unk_token_id not in chat.tokens([prompt]).ids.flatten().tolist()
    first = prompt.text.split()[0]
    assert prompt.text.split().count(first) == 2
    assert first not in identity_prompt(chat, avoid=[f"{first} ."]).text.split()
    with pytest.raises(ConfigError, match="100000 words"):
        identity_prompt(chat, n_words=100_000)
    # words of one token only, in a vocabulary of pieces
    with pytest.raises(ConfigError, match="Give a prompt"):
        identity_prompt(deep())  # its words are w3, w4 and so on, none of them alphabetic


# --------------------------------------------------------------------------------------------------------------- errors
def test_bad_input_is_refused() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, PositionError, ShapeError, UnknownName
    from subspace_probe.core.tokens import ALL
    from subspace_probe.interventions.layer_search import search_layers

    def search(sources: Any = ("w5", "w6"), targets: Any = ("w7", "w8"), **settings: Any) -> Any:
        settings = {"readout": MadeUp(needing(1)), **settings}
        return search_layers(deep(), answered(*sources), answered(*targets), **settings)

    assert search().reached
    with pytest.raises(DataError, match=r"same token in 1 of 2 pairs \(rows 1\)"):
        search(targets=("w7", "w6"))
    with pytest.raises(DataError, match="2 source prompts were given for 1"):
        search(targets=("w7",))
    with pytest.raises(DataError, match="1 target prompts have no answer; the first is number 1"):
        search(targets=("w7", ""))
    with pytest.raises(PositionError, match="one token a prompt"):
        search(where=ALL)
    with pytest.raises(UnknownName, match="attn_out"):
        search(stream="attn_ou")
    for name in ("threshold", "eps", "phi"):
        for value in (-0.1, 1.0, float("nan")):
            with pytest.raises(ConfigError, match=f"{name} is"):
                search(**{name: value})
    with pytest.raises(ConfigError, match="max_added is -1"):
        search(max_added=-1)
    with pytest.raises(ShapeError, match=r"shape \(1, 2, 2, 2\) for 1 conditions"):
        search(readout=MadeUp(lambda layers: ([0.5] * 2, [0.5] * 2)))
    with pytest.raises(ShapeError, match="between 0 and 1"):
        search(readout=MadeUp(lambda layers: ([float("nan")], [0.5])))


def test_encoders_are_refused() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.layer_search import search_layers
    from subspace_probe.models import load_model

    model = load_model(tiny("bert"), tokenizer=words())
    with pytest.raises(ConfigError, match="encoder"):
        search_layers(model, answered("w5"), answered("w7"))
