"""The backends agree: every read, edit, gradient and text, on every family, against native.

Attention is computed the same way on both sides, so that patterns are compared too.
"""

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.contracts.test_backends import ENCODERS, REFUSED
from tests.models.tiny import LAYERS, VARIANTS, batch, tiny

if TYPE_CHECKING:
    from subspace_probe.models.comparing import Difference

pytestmark = pytest.mark.slow

CLOSE = 1e-5
OTHERS = ("transformer_lens", "nnsight")
SOME = {"gpt2", "llama", "gemma2", "bloom", "bert"}


def cells() -> list[Any]:
    return [
        pytest.param(
            (backend, variant),
            id=f"{backend}-{variant}",
            marks=() if variant in SOME else pytest.mark.slow,
        )
        for backend in OTHERS
        for variant in VARIANTS
        if (backend, variant) not in REFUSED
    ]


def compared(backend: str, variant: str, other: Any = None) -> "list[Difference]":
    from subspace_probe.models import BACKENDS
    from subspace_probe.models.comparing import compare
    from subspace_probe.models.native import NativeModel

    hf = tiny(variant, attn_implementation="eager")
    model = BACKENDS.load(backend)(other or hf, name=variant)
    return list(compare(NativeModel(hf, name=variant), {backend: model}, batch(9, 6, 3), layers=[0, LAYERS - 1]))


def test_every_backend_is_compared() -> None:
    from subspace_probe.models import BACKENDS

    assert {"native", *OTHERS} == set(BACKENDS)


@pytest.mark.parametrize("case", cells())
def test_everything_is_what_native_says(case: tuple[str, str]) -> None:
    backend, variant = case
    found = compared(backend, variant)
    kinds = [difference.kind for difference in found]
    streams = {difference.what.partition(".")[2] for difference in found if difference.kind == "read"}
    assert {"resid_pre", "pattern", "z", "attn_out", "mlp_out", "resid_post"} <= streams
    assert kinds.count("write") == kinds.count("gradient") >= 10
    assert ("text" in kinds) == (variant not in ENCODERS)
    refused = [difference for difference in found if isinstance(difference.found[backend], str)]
    assert not refused
    wrong = [(d.kind, d.what, d.worst()) for d in found if d.worst() > CLOSE]
    assert not wrong


@pytest.mark.parametrize("variant", VARIANTS)
def test_patterns_are_the_models_own(variant: str) -> None:
    """Read where attention is eager, as Transformers gives them; by head too; refused where it is fused."""
    from subspace_probe.core.errors import UnsupportedSite
    from subspace_probe.core.sites import Site
    from subspace_probe.models.native import NativeModel

    shown = batch(9, 6, 3)
    hf = tiny(variant, attn_implementation="eager")
    asked = [Site(layer, "pattern") for layer in range(LAYERS)]
    reads = NativeModel(hf, name=variant).run(shown, reads=[*asked, Site(1, "pattern", 2)]).reads
    positions = {} if variant == "bloom" else {"position_ids": shown.positions}
    with torch.no_grad():
        own = hf(input_ids=shown.ids, attention_mask=shown.mask.long(), output_attentions=True, **positions).attentions
    for site, wanted in zip(asked, own, strict=True):
        assert torch.equal(reads[site], wanted)
        seen = reads[site].sum(-1)[shown.mask[:, None].expand(-1, 4, -1)]
        assert torch.allclose(seen, torch.ones_like(seen), atol=1e-5)
    assert torch.equal(reads[Site(1, "pattern", 2)], own[1][:, 2])
    usual = tiny(variant)  # fused, where the family has it
    if usual.config._attn_implementation != "eager":
        with pytest.raises(UnsupportedSite, match="attn_implementation='eager'"):
            NativeModel(usual, name=variant).run(shown, reads=asked)


def test_patterns_cannot_be_edited() -> None:
    from subspace_probe.core.errors import UnsupportedSite
    from subspace_probe.core.sites import Site
    from subspace_probe.models.native import NativeModel

    model = NativeModel(tiny("llama", attn_implementation="eager"), name="llama")
    with pytest.raises(UnsupportedSite, match="can only be read"):
        model.run(batch(4), writes={Site(1, "pattern"): lambda x, ctx: x})


@pytest.mark.parametrize("backend", OTHERS)
def test_another_model_does_not_agree(backend: str) -> None:
    """A control: one weight of one block is other, and only what depends on it differs."""
    import copy

    other = copy.deepcopy(tiny("llama", attn_implementation="eager"))
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3] += 0.1
    found = compared(backend, "llama", other)
    assert all(d.worst() < CLOSE for d in found if d.kind == "read" and d.what.startswith("L0"))
    behind = [d for d in found if d.kind in ("write", "gradient") or d.what.startswith("L2.resid")]
    assert all(d.worst() > CLOSE for d in behind if not (d.kind == "gradient" and d.what.startswith("L2.resid_post")))


def test_editing_the_second_norms_input_agrees_in_reads_and_not_in_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake this exists for: the norm's input looks like resid_mid, but writing it does not move the stream."""
    from subspace_probe.models import nns
    from subspace_probe.models.hooks import Hook, _Entering, hook_block

    def through_the_norm(blocks: Any, layout: Any, state: Any) -> list[Hook]:
        hooks = list[Hook]()
        for layer in sorted({site.layer for site in state.sites}):
            streams = {site.stream for site in state.sites if site.layer == layer}
            if "resid_mid" in streams:
                norm = blocks[layer].post_attention_layernorm
                hooks.append(Hook(norm, _Entering(state, layer, "resid_mid"), entry=True))
            hooks += hook_block(blocks[layer], layout, layer, streams - {"resid_mid"}, state)
        return hooks

    monkeypatch.setattr(nns, "hook_blocks", through_the_norm)
    found = {(d.kind, d.what): d.worst() for d in compared("nnsight", "llama")}
    assert all(worst < CLOSE for (kind, what), worst in found.items() if kind == "read" or "resid_mid" not in what)
    assert min(worst for (kind, what), worst in found.items() if kind == "write" and "resid_mid" in what) > 1e-2


def test_a_shape_of_its_own_is_a_difference() -> None:
    from subspace_probe.models.comparing import Difference, _difference

    assert _difference(torch.zeros(2), torch.ones(3)) == float("inf")
    assert Difference("read", "L0.z", {"a": "refused"}).worst() == 0
