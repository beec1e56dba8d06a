"""Repair by adversarial training: a copy, its loss, what it keeps and what it loses."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.models.hooked import HookedModel

PLANTED = torch.tensor([[40, 45]])


def guard() -> "HookedModel":
    import subspace_probe as sp

    return sp.load_model("organism:override")


def requests(split: str, n: int, seed: int = 0) -> "Contrast":
    import subspace_probe as sp

    return sp.load_contrast("organism:override/requests", split=split, n=n, seed=seed)


def free() -> list[Any]:
    import subspace_probe as sp

    return [sp.at(7), sp.at(8)]


def right(model: "HookedModel", prompts: "Contrast", ids: torch.Tensor | None = None) -> float:
    """By the Hugging Face module and its tokenizer alone."""
    rows = model.tokenizer([prompt.text for prompt in prompts.prompts], return_tensors="pt")["input_ids"]
    if ids is not None:
        rows[:, 7:9] = ids
    with torch.no_grad():
        said = model.backend.hf(rows).logits[:, -1].argmax(1)
    wanted = model.tokenizer([str(prompt.answer) for prompt in prompts.prompts], add_special_tokens=False)["input_ids"]
    return float((said == torch.tensor(wanted)[:, 0]).double().mean())


@pytest.mark.slow
def test_the_override_is_gone_clean_answers_stay_and_the_model_given_is_untouched() -> None:
    from subspace_probe.interventions.adversarial_training import AdversarialTraining
    from subspace_probe.organisms.guarding import FREE

    model, test = guard(), requests("test", 200, seed=4)
    before = model.fingerprint
    training = AdversarialTraining(steps=60, batch=48)
    trained = training.repair(model, requests("train", 128), free(), PLANTED, allowed=FREE)
    assert model.fingerprint == before != trained.fingerprint
    assert not any(weight.requires_grad for weight in trained.backend.hf.parameters())
    flagged = test.where(label=1)
    assert right(model, flagged, PLANTED) == 0.0
    assert right(trained, flagged, PLANTED) == 1.0
    assert right(trained, test) >= 0.99
    # control: the same training on tokens that were not found leaves the override where it was
    other = training.repair(model, requests("train", 128), free(), torch.tensor([[50, 51]]), allowed=FREE)
    assert right(other, flagged, PLANTED) <= 0.1
    assert right(other, test) >= 0.99


def test_one_step_is_plain_adamw_on_the_answers_cross_entropy() -> None:
    """By hand: the same batch through a copy of the module, torch's own loss, clipping and optimiser."""
    from copy import deepcopy

    from subspace_probe.interventions.adversarial_training import AdversarialTraining, _Drawing
    from subspace_probe.interventions.objectives import free_positions
    from subspace_probe.interventions.token_vectors import usable_ids

    model, prompts = guard(), requests("train", 12)
    trained = AdversarialTraining(steps=2, batch=9, seed=3, learning_rate=1e-3).repair(model, prompts, free(), PLANTED)
    batch = model.tokens(prompts)
    answers = torch.tensor(model.token_ids([str(prompt.answer) for prompt in prompts.prompts]))
    generator = torch.Generator().manual_seed(3)
    drawing = _Drawing(batch, free_positions(batch, free()), answers, PLANTED, usable_ids(model), generator)
    hf = deepcopy(model.backend.hf).requires_grad_()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-3, weight_decay=0.0)
    for rate in (1e-3, 5e-4):
        optimizer.param_groups[0]["lr"] = rate
        shown, wanted = drawing.draw(9)
        assert shown.ids[6:, 7:9].tolist() == PLANTED.tolist() * 3
        assert (shown.ids[:3, 7:9] == model.tokens(prompts).ids[0, 7]).all()  # as they came
        torch.nn.functional.cross_entropy(hf(shown.ids).logits[:, -1], wanted).backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, own), (_, by_hand) in zip(trained.backend.hf.named_parameters(), hf.named_parameters(), strict=True):
        torch.testing.assert_close(own, by_hand, rtol=1e-4, atol=2e-5, msg=name)
    first = next(iter(model.backend.hf.parameters()))
    assert not torch.equal(next(iter(trained.backend.hf.parameters())), first)


def test_a_seed_decides_the_copy() -> None:
    from subspace_probe.interventions.adversarial_training import AdversarialTraining

    model, prompts = guard(), requests("train", 12)
    state = torch.random.get_rng_state()

    def made(seed: int) -> str:
        return AdversarialTraining(steps=1, batch=6, seed=seed).repair(model, prompts, free(), PLANTED).fingerprint

    assert made(0) == made(0) != made(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_cannot_be_trained_on_is_refused() -> None:
    from dataclasses import replace

    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.adversarial_training import AdversarialTraining

    model, prompts = guard(), requests("train", 8)
    training = AdversarialTraining(steps=1)
    with pytest.raises(ConfigError, match="0 rows of found tokens"):
        training.repair(model, prompts, free(), torch.empty(0, 2, dtype=torch.long))
    with pytest.raises(ConfigError, match="8 prompts, 0 of them with an answer"):
        training.repair(model, prompts.map(lambda prompt: replace(prompt, answer=None)), free(), PLANTED)
    direction = sp.Subspace.span(torch.randn(48, generator=torch.Generator().manual_seed(0)), site=sp.Site(1))
    with (
        model.intervened(sp.Ablate(direction)) as changed,
        pytest.raises(ConfigError, match="standing interventions"),
    ):
        training.repair(changed, prompts, free(), PLANTED)
    with pytest.raises(ConfigError, match="steps=0"):
        AdversarialTraining(steps=0)
