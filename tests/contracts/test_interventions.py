"""Every intervention of the table: what holds for each, whatever it does. Adding the line adds the tests."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.protocols import Intervention
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.models.hooked import HookedModel

PROMPTS = [text(length, seed=length) for length in (5, 8, 6)]
WIDTH = 32


def direction(seed: int = 0) -> "Subspace":
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace

    return Subspace.span(3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), site=Site(1))


def example(name: str) -> "Callable[[Any], Intervention]":
    """How one of each is made, for given tokens."""
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions import INTERVENTIONS
    from subspace_probe.interventions.sources import Source
    from subspace_probe.interventions.targets import HalfSpace

    kind = INTERVENTIONS.load(name)
    states = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    made: dict[str, Callable[[Any], Any]] = {
        "steer": lambda where: kind(direction(), 1.0, where=where),
        "ablate": lambda where: kind(direction(), Site(1), where),
        "patch": lambda where: kind(Source.value(Site(1), states[0]), where, direction()),
        "knob_clamp": lambda where: kind(direction(), 2.0, where=where),
        "reroute": lambda where: kind(HalfSpace.of(direction(), margin=20.0), site=Site(1), where=where),
    }
    return made[name]  # a new intervention needs one here: what an example of it is cannot be guessed


def names() -> list[str]:
    return ["steer", "ablate", "patch", "knob_clamp", "reroute"]


@pytest.fixture(scope="module", params=["native", "transformer_lens", "nnsight"])
def model(request: pytest.FixtureRequest) -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny("llama"), tokenizer=words(), backend=request.param)


def test_every_intervention_of_the_table_is_here() -> None:
    from subspace_probe.interventions import INTERVENTIONS

    assert names() == list(INTERVENTIONS.table)


@pytest.mark.parametrize("name", names())
def test_it_acts_on_its_tokens_alone_and_ends_with_its_run(model: "HookedModel", name: str) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, LAST

    edit = example(name)(LAST)
    clean, site = model.logits(PROMPTS), Site(1)
    before = model.capture(PROMPTS, sites=site, where=ALL)
    after = model.capture(PROMPTS, sites=site, where=ALL, interventions=[edit])
    moved = (after.at(site) - before.at(site)).abs().amax(1) > 1e-6
    last = torch.tensor([4, 12, 18])
    assert moved.nonzero().flatten().tolist() == last.tolist()
    assert not torch.allclose(model.logits(PROMPTS, interventions=[edit]), clean, atol=1e-3)
    assert torch.equal(model.logits(PROMPTS), clean)


@pytest.mark.parametrize("name", names())
def test_orders_and_nesting_are_one_composition(model: "HookedModel", name: str) -> None:
    from subspace_probe.core.tokens import ALL
    from subspace_probe.interventions.steer import Steer

    first, second = example(name)(ALL), Steer(direction(5), 1.0)
    together = model.logits(PROMPTS, interventions=[first, second])
    with model.intervened(first) as once, once.intervened(second) as twice:
        assert torch.equal(twice.logits(PROMPTS), together)
        assert torch.equal(once.logits(PROMPTS, interventions=[second]), together)
    if name != "steer":  # what sets a coordinate and what adds to it do not commute: the order given is the order
        assert not torch.allclose(model.logits(PROMPTS, interventions=[second, first]), together, atol=1e-4)


@pytest.mark.parametrize("name", names())
def test_all_backends_give_the_same(model: "HookedModel", name: str) -> None:
    from subspace_probe.core.tokens import ALL, GENERATED
    from subspace_probe.models import load_model

    native = load_model(tiny("llama"), tokenizer=words())
    edit = example(name)(ALL)
    wanted = native.logits(PROMPTS, interventions=[edit])
    scale = float(wanted.abs().max())
    assert float((model.logits(PROMPTS, interventions=[edit]) - wanted).abs().max()) < 1e-5 * scale
    later = example(name)(GENERATED)
    text = native.generate(PROMPTS, interventions=[later], max_new_tokens=5)
    assert model.generate(PROMPTS, interventions=[later], max_new_tokens=5) == text


@pytest.mark.parametrize("name", names())
def test_it_survives_json_and_another_subspace(name: str) -> None:
    from subspace_probe.core.keys import content_key
    from subspace_probe.core.tokens import after, at
    from subspace_probe.interventions.files import from_json, to_json
    from subspace_probe.models import load_model

    native = load_model(tiny("llama"), tokenizer=words())
    edit = example(name)(after(at(1)))
    (back,) = from_json(to_json(edit))
    assert content_key(back) == content_key(edit)
    assert repr(back) == repr(edit)
    other = edit.with_subspace(direction(3))
    there = native.logits(PROMPTS, interventions=[other])
    assert not torch.allclose(there, native.logits(PROMPTS, interventions=[edit]), atol=1e-4)
    again = native.logits(PROMPTS, interventions=[other.with_subspace(direction())])
    torch.testing.assert_close(again, native.logits(PROMPTS, interventions=[edit]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", names())
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    from subspace_probe.core.errors import PositionError, ShapeError, StaleStore
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import ALL, GENERATED
    from subspace_probe.models import load_model

    native = load_model(tiny("llama"), tokenizer=words())
    edit = example(name)
    with pytest.raises(PositionError, match="touches no token"):
        native.logits(PROMPTS, interventions=[edit(GENERATED)])
    with pytest.raises(PositionError, match="touches no token"):
        native.generate(PROMPTS, interventions=[edit(GENERATED)], max_new_tokens=1)
    with pytest.raises(ShapeError, match=r"wide|width"):
        native.logits(PROMPTS, interventions=[edit(ALL).with_subspace(Subspace.span(torch.ones(8)))])
    foreign = Subspace.span(torch.ones(WIDTH), notes={"fingerprint": "of another"})
    with pytest.raises(StaleStore, match="another"):
        native.logits(PROMPTS, interventions=[edit(ALL).with_subspace(foreign)])
