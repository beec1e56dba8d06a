"""Conditions stacked above a shared prefix equal one plain run each."""

import pytest
import torch


def _conditions():
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import LAST, T_INST
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.steer import Steer

    def direction(seed: int, layer: int):
        vector = torch.randn(128, generator=torch.Generator().manual_seed(seed))
        return Subspace.span(3 * vector / vector.norm(), site=Site(layer))

    return [
        None,
        Steer(direction(0, 2), where=T_INST),
        Steer(direction(1, 1), where=LAST),
        Steer(direction(2, 3), -1.0),
        Steer(direction(3, 1), site=Site(1, "attn_out")),
        Steer(direction(4, 2), site=Site(2, "resid_mid")),
        Ablate(direction(5, 0)),
    ]


PROMPTS = ["please sweep the floor", "can you fold the paper today ?", "i want to wash the cup", "name the capital"]


@pytest.mark.parametrize("budget", [1, 100, 100_000])
@pytest.mark.parametrize("picked", [slice(0, 3), slice(0, 7), slice(3, 4), slice(5, 6)])
def test_stacked_equals_single(chat, budget: int, picked: slice) -> None:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.interventions.conditions import condition_logits

    conditions = _conditions()[picked]
    prompts = [Prompt(text=text) for text in PROMPTS]
    stacked = condition_logits(chat, prompts, conditions, batch_tokens=budget)
    for row, condition in zip(stacked, conditions, strict=True):
        single = chat.logits(prompts, interventions=[condition] if condition else [])
        assert torch.allclose(row, single, atol=2e-5)


def test_the_conditions_differ(chat) -> None:
    """Control: the equality above is not that of seven runs without an effect."""
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.interventions.conditions import condition_logits

    stacked = condition_logits(chat, [Prompt(text=text) for text in PROMPTS], _conditions())
    for i in range(len(stacked)):
        for j in range(i):
            assert float((stacked[i] - stacked[j]).abs().max()) > 1e-3


def test_standing_interventions_are_under_every_condition(chat) -> None:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.interventions.conditions import condition_logits

    prompts = [Prompt(text=text) for text in PROMPTS]
    _, high, low, *_ = _conditions()
    for standing, condition in ((low, high), (high, low)):  # below and above the prefix
        with chat.intervened(standing) as model:
            stacked = condition_logits(model, prompts, [None, condition])
        assert torch.allclose(stacked[0], chat.logits(prompts, interventions=[standing]), atol=2e-5)
        assert torch.allclose(stacked[1], chat.logits(prompts, interventions=[standing, condition]), atol=2e-5)


def test_a_standing_edit_of_the_same_tensor_under_its_other_name_keeps_its_place(chat) -> None:
    """Steering resid_post[2] under a standing ablation that edits resid_pre[3]: first steered, then ablated."""
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.conditions import condition_logits
    from subspace_probe.interventions.steer import Steer

    prompts = [Prompt(text=text) for text in PROMPTS]
    direction = _conditions()[1].subspace
    steer = Steer(direction, where=LAST)
    with chat.intervened(Ablate(direction)) as model:
        stacked = condition_logits(model, prompts, [None, steer])
        assert torch.allclose(stacked[1], model.logits(prompts, interventions=[steer]), atol=2e-5)
        assert torch.allclose(stacked[1], stacked[0], atol=2e-5)  # what was added is taken out again
