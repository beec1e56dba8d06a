"""Path patching against closed forms, and against blocks run by hand with the model's own modules."""

import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import LAYERS, VARIANTS, text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel

BASE = [text(length, seed) for seed, length in enumerate((4, 9, 6))]
SOURCE = [text(length, seed + 50) for seed, length in enumerate((4, 9, 6))]
HEADS, WIDTH = 4, 8
CASES = [("gpt2", "native"), ("llama", "native"), ("gpt_neox", "native"), ("gpt2", "transformer_lens")]
FINAL = LAYERS - 1


@cache
def model_of(variant: str, backend: str = "native") -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny(variant), tokenizer=words(), backend=backend)


def states(model: "HookedModel", prompts: list[str], site: str, where: str = "last", **kw: Any) -> Tensor:
    from subspace_probe.core.sites import Site

    return model.capture(prompts, sites=site, where=where, **kw).at(Site.parse(site))


def received(patch: Any, site: str) -> Tensor:
    from subspace_probe.core.sites import Site

    return patch.source.states[Site.parse(site)]


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


# --------------------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize(("variant", "backend"), CASES)
@pytest.mark.parametrize("sender", ["L0.attn_out", "L1.resid_pre"])
def test_with_all_frozen_the_stream_gets_the_difference(variant: str, backend: str, sender: str) -> None:
    """resid_pre of a later layer is clean + (source - base): nothing else writes to it."""
    from subspace_probe.interventions.path_patch import path_patch

    model = model_of(variant, backend)
    clean = states(model, BASE, "L2.resid_pre")
    wanted = clean + states(model, SOURCE, sender) - states(model, BASE, sender)
    found = received(path_patch(model, BASE, SOURCE, sender, "L2.resid_pre"), "L2.resid_pre")
    assert close(found, wanted)
    free = received(path_patch(model, BASE, SOURCE, sender, "L2.resid_pre", freeze=()), "L2.resid_pre")
    assert not close(free, wanted)  # control: what lies between answers, unless it is frozen
    assert not close(clean, wanted)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
@pytest.mark.parametrize("freeze", [("attn_out", "mlp_out"), ("mlp_out",)])
def test_a_head_sends_through_its_rows_of_the_output_projection(variant: str, freeze: tuple[Any, ...]) -> None:
    """Its own layer's attn_out is not frozen, or nothing of it would get out."""
    from subspace_probe.interventions.path_patch import path_patch

    model, hf, head = model_of(variant), tiny(variant), 2
    part = slice(head * WIDTH, (head + 1) * WIDTH)
    if variant == "gpt2":
        rows = hf.transformer.h[FINAL].attn.c_proj.weight[part]
    else:
        rows = hf.model.layers[FINAL].self_attn.o_proj.weight[:, part].T
    sender = f"L{FINAL}.z.h{head}"
    moved = (states(model, SOURCE, sender) - states(model, BASE, sender)) @ rows.detach()
    found = received(
        path_patch(model, BASE, SOURCE, sender, f"L{FINAL}.resid_mid", freeze=freeze), f"L{FINAL}.resid_mid"
    )
    assert close(found, states(model, BASE, f"L{FINAL}.resid_mid") + moved)
    assert float(moved.abs().max()) > 0.1


def test_a_neuron_layer_sends_through_the_down_projection() -> None:
    from subspace_probe.interventions.path_patch import path_patch

    model, weight = model_of("gpt2"), tiny("gpt2").transformer.h[0].mlp.c_proj.weight.detach()
    moved = (states(model, SOURCE, "L0.mlp_post") - states(model, BASE, "L0.mlp_post")) @ weight
    found = received(path_patch(model, BASE, SOURCE, "L0.mlp_post", "L2.resid_pre"), "L2.resid_pre")
    assert close(found, states(model, BASE, "L2.resid_pre") + moved)
    assert not close(found, states(model, BASE, "L2.resid_pre"))


@pytest.mark.parametrize("variant", ["gpt2", "gemma2", "gpt_neox", "falcon_sequential"])
def test_direct_effects_on_the_last_state_sum_to_the_whole(variant: str) -> None:
    """The last state is the sum of what was written: the embedding, and every component's output."""
    from subspace_probe.interventions.path_patch import path_patch

    model, end = model_of(variant), f"L{FINAL}.resid_post"
    clean, other = states(model, BASE, end), states(model, SOURCE, end)
    senders = ["L0.resid_pre"] + [f"L{i}.{name}" for i in range(LAYERS) for name in ("attn_out", "mlp_out")]
    effects = [received(path_patch(model, BASE, SOURCE, sender, end), end) - clean for sender in senders]
    assert close(clean + sum(effects), other)
    assert all(not close(clean + sum(effects) - effect, other) for effect in effects)  # control: none is spare


def test_nothing_frozen_is_a_plain_patch_of_the_sender() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.path_patch import path_patch
    from subspace_probe.interventions.sources import Source

    for variant, backend in (("gpt2", "native"), ("gpt2", "transformer_lens"), ("mistral", "native")):
        model = model_of(variant, backend)
        site = Site(0, "z", 1)
        plain = model.logits(BASE, interventions=[Patch(Source.of(model.capture(SOURCE, sites=[site])), LAST)])
        total = path_patch(model, BASE, SOURCE, site, Site(-1), freeze=())
        assert close(model.logits(BASE, interventions=[total]), plain)
        direct = path_patch(model, BASE, SOURCE, site, Site(-1))
        assert not close(model.logits(BASE, interventions=[direct]), plain)  # control


def test_frozen_tokens_that_were_not_sent_from_stay_as_they_are() -> None:
    from subspace_probe.core.tokens import ALL, LAST, at
    from subspace_probe.interventions.path_patch import path_patch

    model = model_of("llama")
    clean = states(model, BASE, "L2.resid_pre", "all")
    last = torch.tensor([len(prompt.split()) for prompt in BASE]).cumsum(0) - 1
    first = torch.tensor([0, *(last[:-1] + 1)])
    for where, rows in ((LAST, last), (at(0), first)):
        found = path_patch(model, BASE, SOURCE, "L0.mlp_out", "L2.resid_pre", where=where, receiver_where=ALL)
        changed = (received(found, "L2.resid_pre") != clean).any(-1)
        assert changed.nonzero().flatten().tolist() == rows.tolist()  # bitwise: held states are copies
        assert found.where == ALL
    free = path_patch(
        model, BASE, SOURCE, "L0.mlp_out", "L2.resid_pre", where=at(0), receiver_where=ALL, freeze=("mlp_out",)
    )
    moved = (received(free, "L2.resid_pre") - clean).abs().amax(-1) > 1e-3
    assert moved.sum() > 2 * len(BASE)  # control: attention carries it to later tokens


def test_a_prompt_for_itself_is_nothing() -> None:
    from subspace_probe.interventions.path_patch import path_patch

    model, clean = model_of("gpt2"), model_of("gpt2").logits(BASE)
    for freeze in (("attn_out", "mlp_out"), ("attn_out",), ()):
        ends = ["L1.z.h3", "L2.attn_out", "L2.resid_post"]
        for given, same in ((BASE, True), (SOURCE, False)):
            patch = path_patch(model, BASE, given, "L0.attn_out", ends, freeze=freeze)
            assert close(model.logits(BASE, interventions=[patch]), clean) is same
            assert all(close(received(patch, end), states(model, BASE, end)) is same for end in ends)


def test_noising_and_denoising_are_opposite_on_the_direct_path() -> None:
    from subspace_probe.interventions.path_patch import path_patch

    model, end = model_of("gpt2"), "L2.resid_mid"
    noised = received(path_patch(model, BASE, SOURCE, "L0.z.h1", end), end) - states(model, BASE, end)
    denoised = received(path_patch(model, SOURCE, BASE, "L0.z.h1", end), end) - states(model, SOURCE, end)
    assert close(noised, -denoised)
    other = received(path_patch(model, SOURCE, BASE, "L0.z.h1", end, freeze=()), end) - states(model, SOURCE, end)
    assert not close(noised, -other)  # control: with all paths, it matters what else is in the prompt


def test_a_subspace_sends_its_component_alone() -> None:
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.path_patch import path_patch

    model, end = model_of("gpt2"), "L1.resid_pre"
    subspace = Subspace.span(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    change = states(model, SOURCE, "L0.attn_out") - states(model, BASE, "L0.attn_out")
    found = path_patch(model, BASE, SOURCE, "L0.attn_out", end, subspace=subspace)
    inside = change @ subspace.basis.T @ subspace.basis
    assert close(received(found, end), states(model, BASE, end) + inside)
    assert not close(inside, change)


# -------------------------------------------------------------------------------------------------------------- by hand
def _head_by_hand(block: Any, x: Tensor, head: int) -> Tensor:
    """One head of GPT-2's attention, of one unpadded prompt, shape [pos, d_head]."""
    q, k, v = block.attn.c_attn(block.ln_1(x)).split(HEADS * WIDTH, dim=-1)
    part = slice(head * WIDTH, (head + 1) * WIDTH)
    scores = q[:, part] @ k[:, part].T / WIDTH**0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ v[:, part]


def _kept(prompt: str) -> dict[str, Tensor]:
    """What the components of GPT-2 gave, of one unpadded prompt, by plain torch hooks."""
    hf, found = tiny("gpt2"), dict[str, Tensor]()

    def keep(name: str, take: Callable[[Any, Any], Tensor]) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            found[name] = take(args, output)

        return hook

    handles: list[Any] = []
    for i, block in enumerate(hf.transformer.h):
        handles.append(block.attn.register_forward_hook(keep(f"a{i}", lambda args, output: output[0][0])))
        handles.append(block.mlp.register_forward_hook(keep(f"m{i}", lambda args, output: output[0])))
    first = hf.transformer.h[0]
    handles.append(first.attn.c_proj.register_forward_hook(keep("z", lambda args, output: args[0][0])))
    handles.append(first.register_forward_hook(keep("x", lambda args, output: args[0][0])))
    hf(**words()(prompt, return_tensors="pt"), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _by_hand(base: str, source: str, freeze: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Head 1 of layer 0 at the last token to head 3 of layer 2: that head's last state, and the logits it leads to."""
    hf, kept, other = tiny("gpt2"), _kept(base), _kept(source)
    blocks = hf.transformer.h
    part = slice(WIDTH, 2 * WIDTH)
    x, sent = kept["x"].clone(), torch.zeros_like(kept["x"])
    sent[-1] = (other["z"][-1, part] - kept["z"][-1, part]) @ blocks[0].attn.c_proj.weight[part]
    for i in range(2):
        fresh = kept["a0"] + sent if i == 0 else blocks[1].attn(blocks[1].ln_1(x)[None])[0][0]
        x = x + (kept["a1"] if i == 1 and "attn_out" in freeze else fresh)
        x = x + (kept[f"m{i}"] if "mlp_out" in freeze else blocks[i].mlp(blocks[i].ln_2(x)))
    z = _head_by_hand(blocks[2], x, 3)[-1]

    def put(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        changed = args[0].clone()
        changed[0, -1, 3 * WIDTH : 4 * WIDTH] = z
        return (changed,)

    handle = blocks[2].attn.c_proj.register_forward_pre_hook(put)
    logits = hf(**words()(base, return_tensors="pt"), use_cache=False).logits[0, -1]
    handle.remove()
    return z, logits


@pytest.mark.parametrize("backend", ["native", "transformer_lens"])
def test_head_to_head_equals_blocks_run_by_hand(backend: str) -> None:
    """All frozen, MLPs recomputed as in the IOI paper, attention recomputed: three answers, each the hand's."""
    from subspace_probe.interventions.path_patch import path_patch

    model, ways = model_of("gpt2", backend), [("attn_out", "mlp_out"), ("attn_out",), ("mlp_out",)]
    found: list[Tensor] = []
    for freeze in ways:
        with torch.no_grad():
            by_hand = [_by_hand(base, source, freeze) for base, source in zip(BASE, SOURCE, strict=True)]
        patch = path_patch(model, BASE, SOURCE, "L0.z.h1", "L2.z.h3", freeze=freeze, batch_tokens=20)
        assert close(received(patch, "L2.z.h3"), torch.stack([z for z, _ in by_hand]))
        assert close(model.logits(BASE, interventions=[patch]), torch.stack([logits for _, logits in by_hand]))
        found.append(received(patch, "L2.z.h3"))
    assert not any(close(found[i], found[j]) for i in range(3) for j in range(i))  # control


# ------------------------------------------------------------------------------------------------------------- the rest
def test_several_receivers_each_get_what_they_would_get_alone() -> None:
    from subspace_probe.interventions.path_patch import path_patch

    model, ends = model_of("gpt2"), ["L1.z.h0", "L1.attn_out", "L1.mlp_out", "L2.z.h2", "L2.attn_out", "L2.resid_post"]
    together = path_patch(model, BASE, SOURCE, "L0.attn_out", ends)
    for end in ends:
        alone = received(path_patch(model, BASE, SOURCE, "L0.attn_out", end), end)
        assert close(received(together, end), alone)
        assert not close(alone, states(model, BASE, end))  # control: none was read as frozen


def test_standing_interventions_are_under_the_path() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.path_patch import path_patch
    from subspace_probe.interventions.steer import Steer

    model, end = model_of("gpt2"), "L2.resid_pre"
    steer = Steer(Subspace.span(3 * torch.eye(32)[:1]), site=Site(0, "attn_out"))
    with model.intervened(steer) as steered:
        found = received(path_patch(steered, BASE, SOURCE, "L0.resid_pre", end), end)
        wanted = (
            states(steered, BASE, end) + states(model, SOURCE, "L0.resid_pre") - states(model, BASE, "L0.resid_pre")
        )
    assert close(found, wanted)
    assert not close(found, received(path_patch(model, BASE, SOURCE, "L0.resid_pre", end), end))


def test_the_result_is_an_ordinary_patch() -> None:
    from subspace_probe.core.errors import StaleStore
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.conditions import condition_logits
    from subspace_probe.interventions.path_patch import path_patch
    from subspace_probe.models.hooked import as_prompts

    model = model_of("gpt2")
    patch = path_patch(model, BASE, SOURCE, "L0.z.h1", ["L2.z.h3", "L2.z.h0"])
    assert (patch.where, patch.source.sites) == (LAST, (Site(2, "z", 0), Site(2, "z", 3)))
    notes = json.loads(json.dumps(patch.source.notes))
    assert notes["path"] == {"sender": "L0.z.h1", "where": "last", "frozen": ["attn_out", "mlp_out"]}
    stacked = condition_logits(model, as_prompts(BASE), [None, patch])
    assert close(stacked[1], model.logits(BASE, interventions=[patch]))
    with pytest.raises(StaleStore):
        model_of("llama").logits(BASE, interventions=[patch])


def test_source_tokens_may_be_named_otherwise_and_aligned() -> None:
    from subspace_probe.core.errors import DataError, PositionError
    from subspace_probe.core.tokens import ALL, GENERATED, LAST, at
    from subspace_probe.interventions.path_patch import path_patch

    model, end = model_of("gpt2"), "L1.resid_pre"
    found = path_patch(model, BASE, SOURCE, "L0.attn_out", end, where=at(1), source_where=LAST)
    change = states(model, SOURCE, "L0.attn_out") - states(model, BASE, "L0.attn_out", "at+1")
    assert close(received(found, end), states(model, BASE, end, "at+1") + change)
    longer = [f"{prompt} w5" for prompt in SOURCE]
    with pytest.raises(PositionError, match="align"):
        path_patch(model, BASE, longer, "L0.attn_out", end, where=ALL)
    ended = received(path_patch(model, BASE, longer, "L0.attn_out", end, where=ALL, align="end"), end)
    last = [len(" ".join(BASE[: i + 1]).split()) - 1 for i in range(len(BASE))]
    change = states(model, longer, "L0.attn_out") - states(model, BASE, "L0.attn_out")
    assert close(ended[last], states(model, BASE, end) + change)
    with pytest.raises(DataError, match="2 source prompts were given for 3"):
        path_patch(model, BASE, SOURCE[:2], "L0.attn_out", end)
    with pytest.raises(PositionError, match="generated"):
        path_patch(model, BASE, SOURCE, "L0.attn_out", end, receiver_where=GENERATED)


@pytest.mark.parametrize(
    ("variant", "sender", "receiver", "error", "words_of"),
    [
        ("gpt2", "L1.attn_out", "L1.attn_out", "SiteError", "is the sender itself"),
        ("gpt2", "L0.resid_post", "L1.resid_pre", "SiteError", "are one state"),
        ("gpt2", "L1.attn_out", "L0.mlp_out", "SiteError", "computed before it"),
        ("gpt2", "L1.z.h0", "L1.z.h1", "SiteError", "at the same time"),
        ("gpt2", "L1.z.h0", ["L2.resid_pre", "L0.resid_pre"], "SiteError", "computed before it"),
        ("gpt2", "L0.z.h9", "L1.resid_pre", "SiteError", "heads 0 to 3"),
        ("gpt2", "L0.z", "L7.resid_pre", "SiteError", "3 layers"),
        ("gpt2", "L0.z", "L2.pattern", "UnsupportedSite", "pattern"),
        ("gpt_neox", "L0.attn_out", "L0.mlp_out", "SiteError", "from the same state"),
        ("gpt_neox", "L0.attn_out", "L1.resid_mid", "UnsupportedSite", "in parallel"),
        ("qwen3_moe", "L0.attn_out", "L2.mlp_post", "UnsupportedSite", "experts"),
    ],
)
def test_what_has_no_path_is_refused(variant: str, sender: str, receiver: Any, error: str, words_of: str) -> None:
    import subspace_probe.core.errors as errors
    from subspace_probe.interventions.path_patch import path_patch

    assert variant in VARIANTS
    with pytest.raises(getattr(errors, error), match=words_of):
        path_patch(model_of(variant), BASE, SOURCE, sender, receiver)


def test_what_cannot_be_frozen_is_refused() -> None:
    from subspace_probe.core.errors import UnknownName
    from subspace_probe.interventions.path_patch import path_patch

    with pytest.raises(UnknownName, match="Did you mean 'attn_out'"):
        path_patch(model_of("gpt2"), BASE, SOURCE, "L0.z", "L2.resid_pre", freeze=("attn_ou",))
