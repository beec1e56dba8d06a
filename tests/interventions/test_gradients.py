"""Gradients by the state of a site, against plain autograd on the Hugging Face model and against finite steps."""

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.models.hooked import HookedModel

LENGTHS = (4, 9, 6, 9, 3)


def metric(logits: Tensor, prompts: object) -> Tensor:
    """Curved in the logits, so that a gradient taken at the wrong place differs."""
    return torch.tanh(0.1 * logits[:, 5]) - logits[:, 9] + 0.05 * logits[:, 7].square()


def model_of(variant: str) -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny(variant), tokenizer=words())


def prompts() -> "list[Prompt]":
    from subspace_probe.core.prompts import Prompt

    return [Prompt(text=text(length, seed)) for seed, length in enumerate(LENGTHS)]


def naive(hf: object, block: int) -> list[Tensor]:
    """Per prompt, without padding: the gradient by the output of one block, kept by a plain torch hook."""
    found = []
    for length, seed in zip(LENGTHS, range(len(LENGTHS)), strict=True):
        kept: list[Tensor] = []

        def keep(module: object, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            kept.append(output if isinstance(output, Tensor) else output[0])  # noqa: B023  (used in this turn only)
            kept[0].retain_grad()  # noqa: B023

        blocks = getattr(hf.base_model, "h", None) or hf.base_model.layers
        handle = blocks[block].register_forward_hook(keep)
        ids = words()(text(length, seed), return_tensors="pt")["input_ids"]
        logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        handle.remove()
        (gradient,) = torch.autograd.grad(metric(logits, None).sum(), kept)
        found.append(gradient[0])
    return found


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gpt_neox", "gemma2", "falcon_sequential", "bloom", "mistral"])
@pytest.mark.parametrize("layer", [0, 2])
def test_equals_autograd_of_the_plain_model(variant: str, layer: int) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, LAST, at
    from subspace_probe.interventions.gradients import metric_gradients

    model, expected = model_of(variant), naive(tiny(variant), layer)
    for where, wanted in (
        (LAST, torch.stack([g[-1] for g in expected])),
        (at(1), torch.stack([g[1] for g in expected])),
        (ALL, torch.cat(expected)),
    ):
        found = metric_gradients(model, prompts(), Site(layer), where, metric, batch_tokens=20)
        scale = float(wanted.abs().max()) or 1.0
        assert float((found - wanted).abs().max()) <= 1e-5 * scale
    other = metric_gradients(model, prompts(), Site(1 - min(layer, 1)), LAST, metric)
    assert float((other - torch.stack([g[-1] for g in expected])).abs().max()) > 1e-2  # control: another block's


def test_rows_of_several_tokens_are_those_of_a_capture() -> None:
    """Putting the captured states where they already are changes nothing; in another order it does."""
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL
    from subspace_probe.interventions.gradients import metric_gradients

    model, site = model_of("llama"), Site(1)
    whole = metric_gradients(model, prompts(), site, ALL, metric, batch_tokens=12)
    states = model.capture(prompts(), sites=site, where=ALL).at(site)
    again = metric_gradients(model, prompts(), site, ALL, metric, states=states, batch_tokens=31)
    assert torch.allclose(whole, again, atol=1e-5 * float(whole.abs().max()))
    turned = metric_gradients(model, prompts(), site, ALL, metric, states=states.flip(0))
    assert not torch.allclose(whole, turned, atol=1e-2)  # control: rows in another order are other states


@pytest.mark.parametrize("site", ["L0.resid_pre", "L1.attn_out", "L1.z.h2", "L1.mlp_post", "L2.mlp_out"])
def test_gradients_along_a_path_add_up_to_the_effect_of_the_whole_step(site: str) -> None:
    """Completeness (Sundararajan et al. 2017, proposition 1), against a patch that runs without any gradient."""
    from subspace_probe.core.edits import At
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.gradients import metric_gradients

    model, place = model_of("gpt2"), Site.parse(site)
    base = model.capture(prompts(), sites=place, where=LAST).at(place)
    source = base.roll(1, 0)
    batch = model.tokens(prompts())

    def value(states: Tensor) -> Tensor:
        run = model.run(batch, writes={place: At(LAST, lambda x, rows: states[rows])}, logits_to_keep=1)
        return metric(run.logits[:, -1], None)

    points = (torch.arange(40) + 0.5) / 40
    path = [metric_gradients(model, prompts(), place, LAST, metric, states=base + t * (source - base)) for t in points]
    along = (torch.stack(path).mean(0) * (source - base)).sum(1)
    effect = value(source) - value(base)
    local = (path[0] * (source - base)).sum(1)
    assert float(effect.abs().max()) > 0.1
    assert float((along - effect).abs().max()) < 0.02 * float(effect.abs().max())  # of 40 points
    if site != "L2.mlp_out":
        assert float((local - effect).abs().max()) > 0.05 * float(effect.abs().max())  # control: one end does not


def test_a_standing_ablation_takes_its_direction_out_of_the_gradient() -> None:
    """resid_post[0] and resid_pre[1] are one tensor: the state is differentiated before the edit that stands behind."""
    import subspace_probe as sp
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import ALL, LAST
    from subspace_probe.interventions.gradients import metric_gradients

    model = model_of("llama")
    unit = Subspace.span(torch.randn(32, generator=torch.Generator().manual_seed(1)))
    plain = metric_gradients(model, prompts(), Site(0), LAST, metric)
    with model.intervened(sp.Ablate(unit, sites=sp.resid_pre(1), where=ALL)) as ablated:
        left = metric_gradients(ablated, prompts(), Site(0), LAST, metric)
        behind = metric_gradients(ablated, prompts(), Site(1, "resid_pre"), LAST, metric)
    scale = float(plain.abs().max())
    assert float((left @ unit.basis.T).abs().max()) < 1e-5 * scale
    assert float((plain @ unit.basis.T).abs().max()) > 1e-2 * scale  # control: without the ablation
    assert float((behind @ unit.basis.T).abs().max()) > 1e-2 * scale  # control: behind the ablation


def test_nothing_reaches_the_last_logits_from_an_earlier_token_of_the_last_block() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST, at
    from subspace_probe.interventions.gradients import metric_gradients

    model = model_of("llama")
    assert float(metric_gradients(model, prompts(), Site(-1), at(0), metric).abs().max()) == 0.0
    assert float(metric_gradients(model, prompts(), Site(-2), at(0), metric).abs().max()) > 0.0
    assert float(metric_gradients(model, prompts(), Site(-1), LAST, metric).abs().max()) > 0.0


def test_the_callers_grad_mode_and_the_models_parameters_are_left_alone() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.gradients import metric_gradients

    model = model_of("gpt2")
    with torch.no_grad():
        inside = metric_gradients(model, prompts(), Site(1), LAST, metric)
        assert not torch.is_grad_enabled()
    assert torch.equal(inside, metric_gradients(model, prompts(), Site(1), LAST, metric))
    assert not inside.requires_grad
    assert all(parameter.grad is None for parameter in tiny("gpt2").parameters())


def test_what_cannot_be_differentiated_says_so() -> None:
    from subspace_probe.core.errors import ConfigError, PositionError, ShapeError
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import GENERATED, LAST
    from subspace_probe.interventions.gradients import metric_gradients

    model, site = model_of("llama"), Site(1)

    def counted(logits: Tensor, prompts: object) -> Tensor:
        return (logits.argmax(-1) == 5).double()

    def summed(logits: Tensor, prompts: object) -> Tensor:
        return logits.sum()

    def infinite(logits: Tensor, prompts: object) -> Tensor:
        return (logits[:, 5] * 0).sqrt()

    with pytest.raises(ConfigError, match="no gradient"):
        metric_gradients(model, prompts(), site, LAST, counted)
    with pytest.raises(ShapeError, match="one number"):
        metric_gradients(model, prompts(), site, LAST, summed)
    with pytest.raises(ShapeError, match="not finite"):
        metric_gradients(model, prompts(), site, LAST, infinite)
    with pytest.raises(ShapeError, match="one row a token"):
        metric_gradients(model, prompts(), site, LAST, metric, states=torch.zeros(2, 32))
    with pytest.raises(PositionError, match="no state"):
        metric_gradients(model, prompts(), site, GENERATED, metric)
    with pytest.raises(ConfigError, match="encoder"):
        metric_gradients(model_of("bert"), prompts(), site, LAST, metric)
