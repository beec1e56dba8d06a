"""What a patch restores: against hand-made numbers, and only beyond what its control restores."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.models.hooked import HookedModel


@pytest.fixture(scope="module")
def model() -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny("llama"), tokenizer=words())


def pairs(n: int, lengths: tuple[int, ...] = (6,)) -> "Contrast":
    """Prompts that share all but one word, w5 or w6."""
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt

    texts = [text(lengths[i % len(lengths)], seed=i) for i in range(n)]
    prompts = tuple(Prompt(f"{shown} {word}", answer="w7", foil="w8") for shown in texts for word in ("w5", "w6"))
    return Contrast("words", prompts, (1, 0) * n, pairs=tuple(i // 2 for i in range(2 * n)))


def test_shares_are_ratios_of_means_in_both_directions(model: "HookedModel") -> None:
    import subspace_probe as sp

    contrast, site = pairs(8), sp.Site(1)
    clean, corrupt = contrast.sides()
    for mode, source, base in (("denoise", clean, corrupt), ("noise", corrupt, clean)):
        report = sp.measure_patch(model, contrast, site, mode=mode, draws=40)
        acts = model.capture(source, sites=site)
        runs = (
            model.logits(source),
            model.logits(base),
            model.logits(base, interventions=[sp.Patch(sp.Source.of(acts))]),
        )
        given, before, after = (float((run[:, 7] - run[:, 8]).mean()) for run in runs)
        assert report.finding("restored").estimate == pytest.approx((after - before) / (given - before), abs=1e-4)
    whole = sp.measure_patch(model, contrast, sp.Site(-1)).finding("restored")
    assert whole.estimate == pytest.approx(1.0, abs=1e-5)


def test_less_than_the_control_restores_is_never_supported(chat: Any) -> None:
    import subspace_probe as sp

    planted = sp.organisms.load_truth("chat").planted("refusal")
    contrast = sp.load_contrast("organism:chat/requests", split="test", n=96).first_pairs(24)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(128, generator=generator)
    mixed = sp.Subspace.span(0.6 * planted.vector + 0.8 * noise / noise.norm(), site=planted.site)
    own = sp.Subspace.span(planted.vector, site=planted.site)
    settings = {"metric": "refusal_score", "where": planted.where}
    worse = sp.measure_patch(chat, contrast, planted.site, subspace=mixed, outside=True, **settings).finding("restored")
    assert worse.interval.high < worse.null.low
    assert worse.verdict != "supported"
    better = sp.measure_patch(chat, contrast, planted.site, subspace=own, **settings).finding("restored")
    assert better.verdict == "supported"  # control: the planted direction is
    few = sp.measure_patch(chat, contrast, planted.site, subspace=own, draws=20, **settings).finding("restored")
    assert few.verdict == "unaudited"


def test_few_pairs_and_uneven_prompts_have_no_control_and_say_so(model: "HookedModel") -> None:
    import subspace_probe as sp

    two = sp.measure_patch(model, pairs(3), sp.Site(1)).finding("restored")
    assert two.verdict in ("unaudited", "refuted")
    assert "2 draws" in two.note  # three prompts can be exchanged in two ways
    ragged = sp.measure_patch(model, pairs(6, (4, 6)), sp.Site(1), where=sp.ALL).finding("restored")
    assert ragged.null is None
    assert ragged.verdict == "unaudited"
    assert "no control" in ragged.note


def test_a_difference_that_is_none_is_refused_and_one_that_may_be_is_named(model: "HookedModel") -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError, DataError

    def constant(logits: torch.Tensor, prompts: Any) -> torch.Tensor:
        return logits.softmax(-1).sum(-1).double()

    def coin(logits: torch.Tensor, prompts: Any) -> torch.Tensor:
        return torch.randn(len(logits), generator=torch.Generator().manual_seed(int(1e4 * logits[0, 0]))).double()

    with pytest.raises(ConfigError, match="nothing to restore"):
        sp.measure_patch(model, pairs(6), sp.Site(1), constant)
    unsure = sp.measure_patch(model, pairs(12), sp.Site(1), coin).finding("restored")
    assert unsure.interval is None
    assert "may be 0" in unsure.note
    for wrong in ({"draws": -1},):
        with pytest.raises(ConfigError, match="draws=-1"):
            sp.measure_patch(model, pairs(6), sp.Site(1), **wrong)
    with pytest.raises(DataError, match="None of the"):
        sp.measure_patch(model, pairs(6).where(label=1), sp.Site(1))
