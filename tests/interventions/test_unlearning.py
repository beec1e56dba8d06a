"""Unlearning against its own definition: what may change, what may not, and that something is forgotten at all."""

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.tokens import TokenBatch
    from subspace_probe.interventions.unlearning import Misdirection
    from subspace_probe.models.hooked import HookedModel


def _facts(capital: bool, wording: int) -> "list[Prompt]":
    from subspace_probe.core.prompts import Message, Prompt
    from subspace_probe.organisms import wordings, words

    questions = wordings.CAPITAL_QUESTIONS if capital else wordings.DISH_QUESTIONS
    answers = words.CAPITAL_OF if capital else words.DISH_OF
    return [
        Prompt(messages=(Message(role="user", content=questions[wording].format(c=country)),), answer=answer)
        for country, answer in answers.items()
    ]


@cache
def _accuracy(model: "HookedModel", capital: bool) -> float:
    shown = _facts(capital, 2)
    wanted = torch.tensor(model.token_ids([prompt.answer or "" for prompt in shown]))
    return float((model.logits(shown).argmax(-1) == wanted).double().mean())


@pytest.fixture(scope="module")
def ready(chat: "HookedModel") -> "Misdirection":
    import subspace_probe as sp
    from subspace_probe.interventions.unlearning import Unlearning, prepare

    forget, retain = ([*_facts(capital, 0), *_facts(capital, 1)] for capital in (True, False))
    return prepare(chat, forget, retain, sp.Site(2), Unlearning(steps=30, where=sp.LAST))


def test_a_projected_update_stays_in_its_span(ready: "Misdirection", chat: "HookedModel") -> None:
    from subspace_probe.interventions.unlearning import control_vector
    from subspace_probe.linalg import random_subspace

    span = random_subspace(24, 128, seed=0)
    before = {name: value.clone() for name, value in chat.backend.hf.named_parameters()}
    for constraint, low, high in (("projected", 0.0, 1e-5), ("penalised", 1e-3, 0.6), ("none", 0.6, 1.0)):
        found = ready.unlearn(control_vector(128, seed=0), span=span, constraint=constraint)
        # again by hand, from the weights themselves
        after, outside, total = dict(found.model.backend.hf.named_parameters()), 0.0, 0.0
        changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
        assert sorted(changed) == [f"model.{name}" for name in sorted(found.matrices)]
        assert {name.split(".", 3)[3] for name in changed} == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
        for name in changed:
            delta = (after[name] - before[name]).double().detach()  # [d_model, inputs]
            outside += float((delta - span.double().T @ (span.double() @ delta)).square().sum())
            total += float(delta.square().sum())
        share = (outside / total) ** 0.5
        assert share == pytest.approx(found.off_span, rel=1e-3, abs=1e-9)
        assert low <= share <= high, (constraint, share)
    # the given model is as it was
    assert all(torch.equal(value, before[name]) for name, value in chat.backend.hf.named_parameters())


def test_a_topic_is_forgotten_and_its_relative_kept(ready: "Misdirection", chat: "HookedModel") -> None:
    from subspace_probe.interventions.unlearning import control_vector

    found = ready.unlearn(control_vector(128, seed=0), constraint="none")
    assert found.history[-1]["forget"] < 0.2 * found.history[0]["forget"]
    assert _accuracy(chat, True) == 1.0
    assert _accuracy(chat, False) == 1.0
    assert _accuracy(found.model, True) <= 0.1
    assert _accuracy(found.model, False) >= 0.95
    assert found.off_span != found.off_span  # no span, no share


def test_the_first_loss_is_its_definition(ready: "Misdirection", chat: "HookedModel") -> None:
    """Forget states at the control vector cost nothing; where they are costs what the formula says."""
    import subspace_probe as sp
    from subspace_probe.interventions.unlearning import Unlearning, control_vector, prepare

    forget, retain = _facts(True, 0)[:8], _facts(False, 0)[:8]
    one = prepare(chat, forget, retain, sp.Site(2), Unlearning(steps=1, where=sp.LAST, gamma=3.0))
    control = control_vector(128, seed=1)
    states = chat.capture(forget, sites=sp.Site(2), where=sp.LAST).at(sp.Site(2))
    norm = states.norm(dim=1).mean()
    wanted = (states - 3.0 * norm * control).square().sum(1).mean() / norm**2
    first = one.unlearn(control, constraint="none").history[0]
    assert first["forget"] == pytest.approx(float(wanted), rel=1e-4)
    assert first["retain"] == pytest.approx(0.0, abs=1e-8)


def _whole(hf: Any, batch: "TokenBatch", meant: torch.Tensor) -> torch.Tensor:
    """States behind block 2 by the plain module."""
    inputs = {"attention_mask": batch.mask.long(), "position_ids": batch.positions}
    return hf(input_ids=batch.ids, output_hidden_states=True, **inputs).hidden_states[3][meant]


def test_passes_from_the_middle_give_the_gradients_of_whole_passes(chat: "HookedModel") -> None:
    """Two trained blocks and all tokens, beside autograd over whole passes of the plain module."""
    from copy import deepcopy

    import subspace_probe as sp
    from subspace_probe.interventions.unlearning import Unlearning, control_vector, prepare

    forget, retain = _facts(True, 0)[:4], _facts(False, 1)[:4]
    for where, layers in ((sp.LAST, 1), (sp.LAST, 2), (sp.PROMPT, 2)):
        settings = Unlearning(steps=2, where=where, layers=layers, lr=1e-3, gamma=2.0, alpha=3.0)
        control = control_vector(128, seed=1)
        found = prepare(chat, forget, retain, sp.Site(2), settings).unlearn(control, constraint="none")
        hf = deepcopy(chat.backend.hf)
        names = [name.removeprefix("model.") for name in found.matrices]
        weights = [hf.base_model.get_parameter(name).requires_grad_(True) for name in names]
        batches = [chat.tokens(part) for part in (forget, retain)]
        masks = [b.select(where, b.positions) & b.mask for b in batches]

        with torch.no_grad():
            held, norm = _whole(hf, batches[1], masks[1]), _whole(hf, batches[0], masks[0]).norm(dim=1).mean()
        optimiser = torch.optim.Adam(weights, lr=1e-3)
        for _ in range(2):
            away = (_whole(hf, batches[0], masks[0]) - 2.0 * norm * control).square().sum(1).mean() / norm**2
            loss = away + 3.0 * (_whole(hf, batches[1], masks[1]) - held).square().sum(1).mean() / norm**2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert len(weights) == 2 * layers
        for name, weight in zip(names, weights, strict=True):
            mine = found.model.backend.hf.base_model.get_parameter(name)
            start = chat.backend.hf.base_model.get_parameter(name)
            moved = float((weight - start).detach().norm())
            assert float((mine - weight).detach().norm()) < 0.02 * moved, (
                where,
                layers,
                name,
            )  # Adam's sign of tiny gradients


def test_control_vectors_lie_in_their_span() -> None:
    from subspace_probe.interventions.unlearning import control_vector
    from subspace_probe.linalg import random_subspace, reject

    span = random_subspace(4, 32, seed=0)
    inside, free = control_vector(32, seed=1, span=span), control_vector(32, seed=1)
    assert float(reject(inside, span).norm()) < 1e-6
    assert float(reject(free, span).norm()) > 0.8
    assert float(inside.norm()) == pytest.approx(1.0) == float(free.norm())


def test_what_cannot_be_honoured_is_refused(ready: "Misdirection", chat: "HookedModel") -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError, DataError, ShapeError
    from subspace_probe.interventions.unlearning import Unlearning, control_vector, prepare

    control = control_vector(128, seed=0)
    with pytest.raises(ConfigError, match="needs a span"):
        ready.unlearn(control)
    with pytest.raises(ShapeError, match="width 64"):
        ready.unlearn(control[:64], constraint="none")
    with pytest.raises(ShapeError, match="zero or not finite"):
        ready.unlearn(0 * control, constraint="none")
    with pytest.raises(DataError, match="0 retain"):
        prepare(chat, _facts(True, 0), [], sp.Site(2), Unlearning())
    with pytest.raises(ConfigError, match="steps=0"):
        Unlearning(steps=0)
    half = sp.load_model("organism:chat", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="dtype=float32"):
        prepare(half, _facts(True, 0), _facts(False, 0), sp.Site(2), Unlearning())


def test_relearning_teaches_what_it_is_taught(chat: "HookedModel") -> None:
    """Facts that are not so are learned where they are taught; the model given stays as it was."""
    from dataclasses import replace

    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.relearning import relearn

    lessons = _facts(True, 0)[:4]
    wrong = [replace(p, answer=q.answer) for p, q in zip(lessons, lessons[1:] + lessons[:1], strict=True)]
    wanted = torch.tensor(chat.token_ids([prompt.answer or "" for prompt in wrong]))
    assert float((chat.logits(lessons).argmax(-1) == wanted).double().mean()) == 0.0
    taught = relearn(chat, wrong, steps=15, lr=2e-3)
    assert float((taught.logits(lessons).argmax(-1) == wanted).double().mean()) == 1.0
    assert float((chat.logits(lessons).argmax(-1) == wanted).double().mean()) == 0.0
    with pytest.raises(ConfigError, match="each with an answer"):
        relearn(chat, [replace(lessons[0], answer=None)])
