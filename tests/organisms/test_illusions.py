"""Subspaces with known labels: certificates computed again by the package's own patching, and disjoint sets."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.organisms.illusions import LabelledSubspace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def illusory() -> "list[LabelledSubspace]":
    from subspace_probe.organisms.illusions import illusory_cases

    return list(illusory_cases(limit=2))


@pytest.fixture(scope="module")
def faithful() -> "list[LabelledSubspace]":
    from subspace_probe.organisms.illusions import faithful_cases

    return list(faithful_cases(limit=3))


def flips(case: "LabelledSubspace", subspace: "Subspace | None") -> float:
    """Interchange accuracy both ways within pairs, full vocabulary, by `Patch`."""
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    rows: dict[int, dict[int, int]] = {}
    for row, (pair, label) in enumerate(zip(case.pairs.pairs, case.pairs.labels, strict=True)):
        rows.setdefault(pair, {})[label] = row
    sides: list[Contrast] = [case.pairs.take([pair[label] for pair in rows.values()]) for label in (0, 1)]
    hits = []
    for base, source in (sides, sides[::-1]):
        acts = case.model.capture(source, sites=[case.site], where=case.where)
        logits = case.model.logits(base, interventions=[Patch(Source.of(acts), case.where, subspace)])
        wanted = torch.tensor(case.model.token_ids([str(prompt.answer) for prompt in source.prompts]))
        hits.append((logits.argmax(-1) == wanted).double().mean())
    return float(torch.stack(hits).mean())


def test_illusory_directions_do_what_the_whole_does_not(illusory: "list[LabelledSubspace]") -> None:
    assert [case.kind for case in illusory] == ["planted", "das"]
    for case in illusory:
        assert case.certified
        assert (case.label, case.site.stream) == ("illusory", "mlp_post")
        assert flips(case, case.subspace) == pytest.approx(case.certificate["direction"], abs=1e-9)
        assert flips(case, None) == pytest.approx(case.certificate["whole"], abs=1e-9)
        assert case.certificate["direction"] >= 0.8 > 0.2 > case.certificate["whole"]
        assert case.certificate["right"] >= 0.97
        case.subspace.require_model(case.model.fingerprint)
    # trained from data alone, and close to what was planted, since that is the best there is
    assert abs(illusory[0].subspace.cosine(illusory[1].subspace)) > 0.5


def test_faithful_directions_do_what_the_whole_does(faithful: "list[LabelledSubspace]") -> None:
    assert {case.kind for case in faithful} == {"das", "mean_difference", "planted"}
    for case in faithful:
        assert case.certified
        assert case.label == "faithful"
        assert min(case.certificate["direction"], case.certificate["whole"]) >= 0.8
        assert flips(case, case.subspace) == pytest.approx(case.certificate["direction"], abs=1e-9)
    # control: a random direction of the same site is no case
    from subspace_probe.diagnostics.random_controls import random_like

    assert flips(faithful[0], random_like(faithful[0].subspace, seed=0)) < 0.05


@pytest.mark.slow
def test_an_illusion_in_the_residual_stream() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms.exchanging import Exchange
    from subspace_probe.organisms.illusion_cells import cell_contrast
    from subspace_probe.organisms.residual_gadgets import plant_residual_gadget

    model = sp.load_model("organism:chat")
    train, test = (
        cell_contrast("chat", "knob", split=split, n=n, seed=0) for split, n in (("train", 192), ("test", 48))
    )
    changed, gadget = plant_residual_gadget(model, train, 1, LAST, seed=1300)
    held, site = Exchange(changed, test, LAST), gadget.direction.site
    assert site is not None
    assert site.short == "L1.resid_post"
    assert held.right() >= 0.95
    assert held.flips(site, gadget.direction.basis) >= 0.8
    assert held.flips(site) < 0.2
    assert max(held.flips(site, part[None]) for part in (gadget.sensor, gadget.actuator)) < 0.2
    # control: without the neurons the mixture copies nothing worth the name
    assert Exchange(model, test, LAST).flips(site, gadget.direction.basis) < 0.5
    assert float(gadget.sensor @ gadget.actuator) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match="last block"):
        plant_residual_gadget(model, train, 3, LAST)


def test_the_two_sets_share_no_organism_cell_or_seed() -> None:
    from subspace_probe.organisms import ORGANISMS
    from subspace_probe.organisms.illusion_cells import CARRIERS, HOSTS, PARTIAL, SILENT
    from subspace_probe.organisms.illusions import _SEEDS

    organisms = [
        {cell.organism for table in (HOSTS, CARRIERS, PARTIAL, SILENT) for cell in table[calibration]}
        for calibration in (False, True)
    ]
    assert organisms[0] == {"chat", "chat-natural"}
    assert not organisms[0] & organisms[1]
    assert organisms[0] | organisms[1] <= set(ORGANISMS)
    assert abs(_SEEDS[False] - _SEEDS[True]) >= 1000
    for table in (HOSTS, CARRIERS, PARTIAL, SILENT):
        for cells in table.values():
            assert len(set(cells)) == len(cells)


@pytest.mark.parametrize("name", ["judgement", "refused", "knob", "harmfulness"])
def test_train_and_test_pairs_share_nothing_and_are_minimal(name: str) -> None:
    from subspace_probe.organisms.illusion_cells import cell_contrast

    train, test = (
        cell_contrast("chat", name, split=split, n=64, seed=seed) for split, seed in (("train", 1), ("test", 0))
    )
    assert len(train) == len(test) == 64
    for contrast in (train, test):
        pairs = list(zip(contrast.pairs[::2], contrast.pairs[1::2], strict=True))
        assert all(first == second for first, second in pairs)
        assert len({first for first, _ in pairs}) == 32
        assert all(sum(contrast.labels[2 * i : 2 * i + 2]) == 1 for i in range(32))
    assert not {repr(prompt) for prompt in test.prompts} & {repr(prompt) for prompt in train.prompts}
    if name == "refused":
        verbs, things = test.factors["verb"], test.factors["object"]
        assert verbs[::2] == verbs[1::2]
        assert things[::2] == things[1::2]
        refusing = [prompt.answer == "sorry" for prompt in test.prompts]
        assert refusing == [bool(label) for label in test.labels]
        # harmfulness does not tell the label: it is the same on both sides of a pair, and both kinds occur
        harmful = test.factors["label"]
        assert harmful[::2] == harmful[1::2]
        assert 0 < sum(harmful) < 64


@pytest.mark.slow
def test_what_can_be_read_and_is_not_used() -> None:
    from subspace_probe.organisms.unused import unused_cases

    cases = list(unused_cases(calibration=True, failed=True))
    assert [case.label for case in cases] == ["faithful", "unused", "unused"]
    control, *unused = cases
    states = control.model.capture(control.pairs, sites=[control.site], where=control.where).at(control.site)
    labels = torch.tensor(control.pairs.labels)
    for case in cases:
        assert case.certified
        scores = states @ case.subspace.unit
        higher = scores[labels == 1][:, None] > scores[labels == 0][None]
        assert float(higher.double().mean()) == pytest.approx(case.certificate["auroc"], abs=1e-3)
        assert case.certificate["auroc"] >= 0.95
        assert flips(case, case.subspace) == pytest.approx(case.certificate["direction"], abs=1e-9)
        assert case.certificate["whole"] >= 0.8  # the site is used, the direction is not
    assert control.certificate["direction"] >= 0.8
    assert max(case.certificate["direction"] for case in unused) <= 0.05
    assert abs(unused[1].subspace.cosine(control.subspace)) < 1e-5


@pytest.mark.slow
def test_safety_entangled_with_utility() -> None:
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.organisms.entangled import entangled_cases

    cases = {case.kind: case for case in entangled_cases(failed=True)}
    assert all(case.certified for case in cases.values())
    assert [case.label for case in cases.values()] == ["entangled", "faithful"] * 2

    def right(case: "LabelledSubspace") -> float:
        assert case.skill is not None
        logits = case.model.logits(case.skill, interventions=[Ablate(case.subspace)])
        wanted = torch.tensor(case.model.token_ids([str(prompt.answer) for prompt in case.skill.prompts]))
        return float((logits.argmax(-1) == wanted).double().mean())

    span, alone = cases["span, taken out"], cases["refusal alone, taken out"]
    assert right(span) < 0.7 < 0.97 < right(alone)
    # neither row of the plane is either vector
    assert float((span.subspace.basis @ alone.subspace.unit).abs().max()) < 0.75


@pytest.mark.slow
def test_calibration_cases_exist_for_every_label() -> None:
    from subspace_probe.organisms.illusions import faithful_cases, illusory_cases, inflated_cases

    makers: list[Callable[..., Any]] = [illusory_cases, faithful_cases, inflated_cases]
    for make in makers:
        # the first inflated one that holds is the tenth that is trained; whose it is can be seen of any
        (case,) = make(calibration=True, limit=1, failed=make is inflated_cases)
        assert case.certified or make is inflated_cases
        assert case.model.spec.name.removeprefix("organism:").split(",")[0] not in ("chat", "chat-natural")
