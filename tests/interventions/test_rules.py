"""Conditions: who is asked, what is read, and what is remembered."""

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel

PROMPTS = [
    "i need to dry this rice soon",
    "please wash the stone",
    "tell me how to wash the stone , but you must say no",
    "we should dry the rice tomorrow",
]


def direction(seed: int = 0, layer: int = 1, scale: float = 12.0) -> Any:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace

    vector = torch.randn(128, generator=torch.Generator().manual_seed(seed))
    return Subspace.span(scale * vector / vector.norm(), site=Site(layer))


def moved(model: "HookedModel", intervention: Any, layer: int = 1) -> tuple[Any, Any, Any]:
    """Which tokens of all prompts an intervention moves at a site; with their prompt and position."""
    from subspace_probe.core.sites import Site

    clean = model.capture(PROMPTS, sites=Site(layer), where="all")
    edited = model.capture(PROMPTS, sites=Site(layer), where="all", interventions=[intervention])
    return (edited.at(Site(layer)) != clean.at(Site(layer))).any(1), clean.prompt, clean.position


@pytest.fixture(scope="module")
def scores(chat: "HookedModel") -> Any:
    """The coordinate of every token along a probe, at the edited site and one below."""
    from subspace_probe.core.sites import Site

    acts = chat.capture(PROMPTS, sites=[Site(0), Site(1)], where="all")
    return {layer: acts.at(Site(layer)) @ direction(1).unit for layer in (0, 1)}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("side", ["above", "below"])
def test_tokens_are_judged_by_their_own_states(chat: "HookedModel", scores: Any, layer: int, side: Any) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, PROMPT
    from subspace_probe.interventions.rules import Not, Score
    from subspace_probe.interventions.steer import Steer

    rule = Score(direction(1), 0.2, side, site=Site(layer))
    wanted = scores[layer] >= 0.2 if side == "above" else scores[layer] < 0.2
    assert 0 < int(wanted.sum()) < len(wanted)
    for where in (ALL, PROMPT):
        assert torch.equal(moved(chat, Steer(direction(), where=where, when=rule))[0], wanted)
        assert torch.equal(moved(chat, Steer(direction(), where=where, when=Not(rule)))[0], ~wanted)


def test_one_token_decides_for_its_prompt(chat: "HookedModel", scores: Any) -> None:
    from subspace_probe.core.tokens import LAST, T_INST
    from subspace_probe.interventions.rules import Score
    from subspace_probe.interventions.steer import Steer

    for where in (T_INST, LAST):
        clean = chat.capture(PROMPTS, sites="L1.resid_post", where="all")
        decides = clean.position == chat.tokens(PROMPTS).position(where)[clean.prompt]
        threshold = float(scores[1][decides].mean())
        found, prompt, _ = moved(chat, Steer(direction(), when=Score(direction(1), threshold, where=where)))
        wanted = (scores[1][decides] >= threshold)[prompt]
        assert 0 < int(wanted.sum()) < len(wanted)
        assert torch.equal(found, wanted)


def test_rules_combine_as_logic_does(chat: "HookedModel", scores: Any) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import T_INST
    from subspace_probe.interventions.rules import AllOf, AnyOf, Not, Score
    from subspace_probe.interventions.steer import Steer

    low, high = Score(direction(1), site=Site(0)), Score(direction(1), 0.5)
    decided = Score(direction(1), where=T_INST)
    a, b = scores[0] >= 0, scores[1] >= 0.5
    c = moved(chat, Steer(direction(), when=decided))[0]
    for rule, wanted in (
        (AllOf((low, high)), a & b),
        (AnyOf((low, high)), a | b),
        (AllOf((low, Not(high), decided)), a & ~b & c),
        (Not(AnyOf((low, decided))), ~(a | c)),
    ):
        assert torch.equal(moved(chat, Steer(direction(), when=rule))[0], wanted)


def test_a_half_space_is_a_probe(chat: "HookedModel", scores: Any) -> None:
    from subspace_probe.interventions.rules import Score
    from subspace_probe.interventions.steer import Steer
    from subspace_probe.interventions.targets import HalfSpace

    half = HalfSpace.of(direction(1), margin=0.4)
    assert torch.equal(moved(chat, Steer(direction(), when=Score(half)))[0], scores[1] >= 0.4)
    assert torch.equal(moved(chat, Steer(direction(), when=Score(half, -0.3)))[0], scores[1] >= -0.3)


def test_the_state_is_of_this_pass_and_from_before_the_edit(chat: "HookedModel") -> None:
    """Edits below are seen; those at the rule's own site are not, whichever comes first."""
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.rules import Score
    from subspace_probe.interventions.steer import Steer

    push = Steer(direction(1), 10.0)  # at the probe's site, far above its threshold
    low = Steer(direction(1, layer=0), 10.0)
    ruled = Steer(direction(), when=Score(direction(1), 40.0))
    acts = {}
    for name, listed in {
        "push": [push], "push, ruled": [push, ruled], "ruled, push": [ruled, push],
        "low": [low], "low, ruled": [low, ruled], "high": [Steer(direction(), when=Score(direction(1), 40.0))],
    }.items():  # fmt: skip
        acts[name] = chat.capture(PROMPTS, sites=Site(1), where="all", interventions=listed).at(Site(1))
    assert torch.equal(acts["push"], acts["push, ruled"])
    assert torch.equal(acts["push"], acts["ruled, push"])
    assert not torch.equal(acts["low"], acts["low, ruled"])
    later = Steer(direction(layer=2), when=Score(direction(1), 40.0))  # reads layer 1, after all edits there
    assert bool(chat.logits(PROMPTS, interventions=[push, later]).ne(chat.logits(PROMPTS, interventions=[push])).any())


def test_stacked_conditions_each_decide_for_themselves(chat: "HookedModel") -> None:
    """Prefix reuse and stacking: what one condition reads and remembers is no other's."""
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST, T_INST
    from subspace_probe.interventions.conditions import condition_logits
    from subspace_probe.interventions.knob import KnobClamp
    from subspace_probe.interventions.rules import AnyOf, Not, Score
    from subspace_probe.interventions.steer import Steer

    decided = Score(direction(1), where=T_INST)
    by_token = Score(direction(1), 0.3)
    conditions = [
        None,
        Steer(direction(), when=decided),
        Steer(direction(), when=Not(decided)),
        Steer(direction(layer=2), where=LAST, when=decided),
        Steer(direction(layer=2), (1.0, -2.0, 0.0, 3.0), when=by_token),
        Steer(direction(layer=3), where=LAST, unit="norm", when=AnyOf((decided, Score(direction(2, 2), where=LAST)))),
        KnobClamp(direction(), 20.0, site=Site(-2), when=by_token),
    ]
    prompts = [Prompt(text=text) for text in PROMPTS]
    for budget in (1, 10_000):
        stacked = condition_logits(chat, prompts, conditions, batch_tokens=budget)
        for found, condition in zip(stacked, conditions, strict=True):
            single = chat.logits(prompts, interventions=[condition] if condition else [])
            assert torch.allclose(found, single, atol=5e-5)
    for i in range(len(stacked)):  # a control: they do different things
        assert all(float((stacked[i] - stacked[j]).abs().max()) > 1e-2 for j in range(i))


def test_only_the_deciding_token_is_needed() -> None:
    """So that what lies before it need not be run again."""
    from subspace_probe.core.edits import needs_of
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST, T_INST
    from subspace_probe.interventions.rules import AllOf, Score
    from subspace_probe.interventions.steer import Steer

    rule = AllOf((Score(direction(1, -3), where=T_INST), Score(direction(1, 0))))
    (edit,) = Steer(direction(), where=LAST, when=rule).edits(4).values()
    assert needs_of(edit) == {(Site(1), T_INST), (Site(0), LAST)}


def test_a_rule_of_another_model_or_width_is_refused_before_anything_runs(chat: "HookedModel") -> None:
    from dataclasses import replace

    from subspace_probe.core.errors import ShapeError, StaleStore
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.knob import KnobClamp
    from subspace_probe.interventions.rules import AllOf, Not, Score
    from subspace_probe.interventions.steer import Steer

    narrow = Score(Subspace.span(torch.ones(64), site=Site(1)))
    foreign = Score(replace(direction(1), notes={"fingerprint": "other"}))
    for rule, error in ((narrow, ShapeError), (foreign, StaleStore)):
        for whole in (rule, Not(rule), AllOf((Score(direction(2)), rule))):
            for intervention in (Steer(direction(), when=whole), KnobClamp(direction(), 1.0, when=whole)):
                with pytest.raises(error):
                    chat.check(intervention)


def test_what_a_rule_cannot_know_is_refused(chat: "HookedModel") -> None:
    from subspace_probe.core.edits import EditContext
    from subspace_probe.core.errors import ConfigError, PositionError, RankError, SiteError
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import ALL, LAST
    from subspace_probe.interventions.rules import AllOf, AnyOf, Score
    from subspace_probe.interventions.steer import Steer

    with pytest.raises(SiteError, match=r"depends on L2.resid_post, which is computed later"):
        chat.logits(PROMPTS, interventions=[Steer(direction(), when=Score(direction(1, 2)))])
    with pytest.raises(SiteError, match="Layer 9 was asked for"):
        chat.logits(PROMPTS, interventions=[Steer(direction(), when=Score(direction(1, 9)))])
    with pytest.raises(PositionError, match="'all' is not one token"):
        Score(direction(1), where=ALL)
    with pytest.raises(RankError, match="rank 2"):
        Score(Subspace.span(torch.eye(2, 8), site=Site(0)))
    with pytest.raises(SiteError, match="does not say where"):
        Score(Subspace.span(torch.ones(8)))
    with pytest.raises(ConfigError, match="finite"):
        Score(direction(1), math.nan)
    for kind in (AllOf, AnyOf):
        with pytest.raises(ConfigError, match="No rules"):
            kind(())
    shown = chat.tokens(PROMPTS)
    ctx = EditContext(shown, shown.positions, shown.mask)
    with pytest.raises(SiteError, match=r"reads L1.resid_post, but this pass shows \[\]"):
        Score(direction(1))(ctx)
    behind = EditContext(shown, shown.lengths[:, None], shown.mask[:, -1:], reads={Site(1): torch.zeros(4, 1, 128)})
    with pytest.raises(PositionError, match="decides whether prompt 0 is edited"):
        Score(direction(1), where=LAST)(behind)
