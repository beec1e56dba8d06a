"""Searches at equal budgets: a trail says what smaller budgets find; every choice against the module alone."""

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.diagnostics.search_comparison import Searches

FREE = tuple(range(16, 56))


def places() -> list[Any]:
    import subspace_probe as sp

    return [sp.at(7), sp.at(8)]


@cache
def searched(name: str = "override", n: int = 32) -> "Searches":
    import subspace_probe as sp
    from subspace_probe.diagnostics.eligibility import targets_of
    from subspace_probe.diagnostics.search_comparison import compare_searches
    from subspace_probe.metrics import metric_for

    model = sp.load_model(f"organism:{name}")
    train = sp.load_contrast(f"organism:{name}/requests", split="train", n=64)
    moved = sp.load_contrast(f"organism:{name}/requests", split="test", n=n).where(label=1)
    acts = model.capture(train, sites=sp.Site(1), where=sp.LAST)
    targets = targets_of(acts, sp.MeanDifference(null_draws=0), [sp.Site(1)])
    metric = metric_for("logit_difference", model)
    search = sp.TokenSearch(budget=160)
    return compare_searches(model, moved, targets, places(), metric, search=search, allowed=FREE)


def test_a_trail_says_what_a_smaller_budget_finds() -> None:
    """Up to its last step, a search with a smaller budget is the same search."""
    import subspace_probe as sp
    from subspace_probe.interventions.objectives import Reach
    from subspace_probe.interventions.targets import HalfSpace

    run = searched()
    model, moved = run.model, run.contrast
    normal = torch.randn(48, generator=torch.Generator().manual_seed(1))
    aim = Reach((HalfSpace(normal, 0.0, 1e3, sp.Site(1), sp.LAST),))  # out of reach
    given: dict[str, Any] = {"allowed": FREE}

    def found(budget: int, strategy: Any) -> Any:
        settings = sp.TokenSearch(budget=budget, width=10, strategy=strategy)
        return settings.search(model, moved, aim, places(), **given)

    for strategy, budget in (("gradient", 1 + 8 + 3 * 11), ("random", 1 + 8 + 30)):
        long, short = found(120, strategy), found(budget, strategy)
        # where every step took a new gradient the steps fit, and the last one was not cut short
        whole = short.gradients == (3 if strategy == "gradient" else 0)
        assert int(whole.sum()) >= 2
        assert torch.equal(long.within(rows=budget)[whole], short.ids[whole])
        assert torch.equal(long.within(), long.ids)
        forwards = short.depth * (short.rows + 2 * short.gradients)
        assert int(forwards.sum()) == short.layer_forwards
        for row in whole.nonzero().flatten().tolist():
            assert torch.equal(long.within(layer_forwards=int(forwards[row]))[row], short.ids[row])
        assert not torch.equal(long.ids, short.ids)  # control: the rest of the budget was good for something
        assert torch.equal(long.within(rows=0), model.tokens(moved).ids[:, 7:9])
        last = [steps[-1] for steps in long.trail]
        assert [step.rows for step in last] == long.found_at.tolist()
        assert all(step.gradients <= total for step, total in zip(last, long.gradients.tolist(), strict=True))


@pytest.mark.slow
def test_flips_are_the_modules_own() -> None:
    run = searched()
    hf, batch = run.model.backend.hf, run.model.tokens(run.contrast)
    for name, found in run.found.items():
        for budget in (20, 80, 160):
            rows = batch.ids.clone()
            rows[:, 7:9] = found.within(rows=budget)
            with torch.no_grad():
                said = hf(rows).logits[:, -1].argmax(1)
            assert torch.equal(run.flipped(name, budget), said != run.model.token_ids(["decline"])[0])
    assert bool(run.flipped("target").all())
    assert not bool(run.flipped("target", 0).any())


@pytest.mark.slow
def test_the_comparison_is_paired_and_its_null_exchanges_the_searches() -> None:
    run = searched()
    n, depth = len(run.contrast), run.model.spec.n_layers
    ahead = run.ahead("random", 160, seed=0)
    gain = run.flipped("target", 160).double() - run.flipped("random", 160).double()
    assert ahead.estimate == pytest.approx(float(gain.mean()))
    assert ahead.verdict == "supported"
    assert ahead.null is not None
    # every gain is 1 here, so the null is a mean of n signs, whose 97.5 % point is near 1.96 / sqrt n
    assert abs(ahead.null.high - 1.96 / n**0.5) < 0.3
    assert run.ahead("target", 160, seed=0).estimate == 0.0  # control: nothing is ahead of itself
    assert run.ahead("target", 160, seed=0).verdict != "supported"
    cost = run.cost("answer", seed=0)
    assert cost.estimate == pytest.approx(run.found["answer"].layer_forwards / run.found["target"].layer_forwards)
    assert run.found["answer"].depth == depth == 2 * run.found["target"].depth
    curve = run.curve([40, 160], seed=0)
    assert {row["budget"] for row in curve if row["unit"] == "layer-forwards"} == {40 * depth, 160 * depth}


def test_prompts_without_an_answer_are_not_searched_for_it() -> None:
    from dataclasses import replace

    from subspace_probe.diagnostics.search_comparison import answer_margin

    run = searched()
    aim = answer_margin(run.model, run.contrast)
    assert aim is not None
    assert aim.foil.tolist() == run.model.token_ids(["decline"]) * len(run.contrast)
    assert answer_margin(run.model, run.contrast.map(lambda prompt: replace(prompt, foil=None))) is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("override", 1), ("robust", 0)])
def test_every_choice_equals_the_module_alone(name: str, count: int) -> None:
    from subspace_probe.diagnostics.exhaustive import every_choice
    from subspace_probe.organisms.overriding import every_suffix

    run = searched(name) if name == "override" else searched(name, 4)
    few = run.contrast.take([0, 1])
    found = every_choice(run.model, few, places(), run.metric, allowed=FREE)
    truth = every_suffix(run.model.backend.hf, run.model.tokens(few).ids, slots=(7, 8), allowed=FREE)
    assert torch.equal(found.ids, truth.suffixes)
    assert torch.equal(found.flipped, truth.flips(run.model.token_ids(["decline"])[0]))
    assert found.flipped.sum(1).tolist() == [count, count]


def test_too_many_choices_are_refused() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.diagnostics.exhaustive import every_choice

    run = searched()
    with pytest.raises(ConfigError, match="40 tokens for 2 positions give 1600 choices a prompt, and at most 100"):
        every_choice(run.model, run.contrast, places(), run.metric, allowed=FREE, most=100)
