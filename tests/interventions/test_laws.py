"""Exact laws of interventions, on the bundled organism."""

import pytest
import torch


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return ["please sweep the floor", "can you fold the paper today ?", "what is the capital of this place"]


def _direction(seed: int = 0, layer: int = 1, scale: float = 3.0):
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace

    vector = torch.randn(128, generator=torch.Generator().manual_seed(seed))
    return Subspace.span(scale * vector / vector.norm(), site=Site(layer))


def test_zero_strength_is_nothing_and_a_real_one_is_not(chat, prompts) -> None:
    from subspace_probe.interventions.steer import Steer

    clean = chat.logits(prompts)
    assert torch.equal(chat.logits(prompts, interventions=[Steer(_direction(), 0.0)]), clean)
    assert not torch.allclose(chat.logits(prompts, interventions=[Steer(_direction(), 1.0)]), clean, atol=1e-3)


def test_steering_and_its_negative_is_nothing(chat, prompts) -> None:
    from subspace_probe.interventions.steer import Steer

    both = [Steer(_direction(), 2.0), Steer(_direction(), -2.0)]
    assert torch.allclose(chat.logits(prompts, interventions=both), chat.logits(prompts), atol=1e-4)


def test_strength_is_in_units_of_the_scale(chat, prompts) -> None:
    from subspace_probe.interventions.steer import Steer

    twice = chat.logits(prompts, interventions=[Steer(_direction(), 2.0)])
    assert torch.allclose(chat.logits(prompts, interventions=[Steer(_direction().scaled(2.0), 1.0)]), twice, atol=1e-5)
    assert torch.allclose(
        chat.logits(prompts, interventions=[Steer(_direction().scaled(-2.0), -1.0)]), twice, atol=1e-5
    )


def test_ablation_leaves_nothing_of_the_direction_anywhere_and_is_idempotent(chat, prompts) -> None:
    from subspace_probe.interventions.ablate import Ablate

    direction = _direction()
    once = chat.capture(prompts, where="all", interventions=[Ablate(direction)])
    clean = chat.capture(prompts, where="all")
    for site in once.sites:
        assert float((once.at(site) @ direction.unit).abs().max()) < 1e-4
        assert float((clean.at(site) @ direction.unit).abs().max()) > 1e-2  # control: it was there before
    ablated = chat.logits(prompts, interventions=[Ablate(direction)])
    assert torch.allclose(chat.logits(prompts, interventions=[Ablate(direction)] * 2), ablated, atol=1e-5)


def test_an_edit_acts_on_the_selected_tokens_only(chat, prompts) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import T_INST
    from subspace_probe.interventions.steer import Steer

    steer = Steer(_direction(layer=1), where=T_INST)
    clean = chat.capture(prompts, sites=Site(1), where="all")
    edited = chat.capture(prompts, sites=Site(1), where="all", interventions=[steer])
    moved = (edited.at(Site(1)) - clean.at(Site(1))).norm(dim=1) > 0
    at_inst = chat.tokens(prompts).position(T_INST)
    assert torch.equal(moved, clean.position == at_inst[clean.prompt])


def test_with_subspace_keeps_everything_else(chat, prompts) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.steer import Steer

    for intervention in (Steer(_direction(), 1.5, site=Site(2)), Ablate(_direction())):
        other = intervention.with_subspace(_direction(seed=1)).with_subspace(intervention.subspace)
        assert other.edits(4).keys() == intervention.edits(4).keys()
        a, b = (chat.logits(prompts, interventions=[i]) for i in (intervention, other))
        assert torch.equal(a, b)


def test_generation_under_an_intervention_is_the_same_with_the_cache_off(chat, prompts) -> None:
    from subspace_probe.core.tokens import GENERATED, T_POST_INST
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.steer import Steer

    for intervention in (
        Steer(_direction(), 2.0),
        Steer(_direction(), 2.0, where=GENERATED),
        Steer(_direction(), 2.0, where=T_POST_INST),
        Ablate(_direction()),
    ):
        texts = [
            chat.generate(prompts, interventions=[intervention], max_new_tokens=8, use_cache=cache)
            for cache in (True, False)
        ]
        assert texts[0] == texts[1]


def test_standing_interventions_leave_the_model_they_came_from_alone(chat, prompts) -> None:
    from subspace_probe.interventions.steer import Steer

    clean, steer = chat.logits(prompts), Steer(_direction())
    with chat.intervened(steer) as steered:
        assert torch.equal(steered.logits(prompts), chat.logits(prompts, interventions=[steer]))
        assert torch.equal(chat.logits(prompts), clean)
        with steered.intervened(steer) as twice:
            assert torch.equal(twice.logits(prompts), chat.logits(prompts, interventions=[steer, steer]))
    assert torch.equal(chat.logits(prompts), clean)


def test_bad_settings_are_refused(chat, prompts) -> None:
    from subspace_probe.core.errors import ConfigError, ShapeError, SiteError
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.steer import Steer

    with pytest.raises(ConfigError, match="finite"):
        Steer(_direction(), float("inf"))
    with pytest.raises(SiteError, match="does not say where"):
        Steer(Subspace.span(torch.ones(128)))
    with pytest.raises(ShapeError, match="width 64 was used where the activations have width 128"):
        chat.logits(prompts, interventions=[Steer(Subspace.span(torch.ones(64)), site=_direction().site)])
    with pytest.raises(SiteError, match="Layer 9 was asked for"):
        chat.logits(prompts, interventions=[Steer(_direction(layer=9))])
