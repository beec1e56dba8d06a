"""The dormant gadget: an illusory direction with known numbers, in a model that otherwise stays what it was."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel
    from subspace_probe.organisms.exchanging import Exchange
    from subspace_probe.organisms.gadgets import Gadget

LAYER = 2
K = 12


@pytest.fixture(scope="module")
def natural() -> "HookedModel":
    import subspace_probe as sp

    return sp.load_model("organism:chat-natural")


@pytest.fixture(scope="module")
def fitted(natural: "HookedModel") -> "Exchange":
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms.exchanging import Exchange
    from subspace_probe.organisms.illusion_cells import cell_contrast

    return Exchange(natural, cell_contrast("chat-natural", "harmfulness", split="train", n=160, seed=1), LAST)


@pytest.fixture(scope="module")
def held_out() -> Any:
    from subspace_probe.organisms.illusion_cells import cell_contrast

    return cell_contrast("chat-natural", "harmfulness", split="test", n=48, seed=0)


@pytest.fixture(scope="module")
def illusory(natural: "HookedModel", fitted: "Exchange") -> "tuple[HookedModel, Gadget]":
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms.gadgets import plant_gadget

    return plant_gadget(natural, fitted, LAYER, LAST, neurons=K, seed=5)


@pytest.fixture(scope="module")
def faithful(natural: "HookedModel", fitted: "Exchange") -> "tuple[HookedModel, Gadget]":
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms.gadgets import plant_gadget

    return plant_gadget(natural, fitted, LAYER, LAST, neurons=K, kappa=2.0, faithful=True, seed=5)


def weight(model: "HookedModel", layer: int, name: str) -> torch.Tensor:
    return model.backend.hf.get_parameter(f"model.layers.{layer}.mlp.{name}.weight").detach()


def hidden(model: "HookedModel", prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """mlp_post and mlp_out of the layer at the last token, by the package's own capture."""
    from subspace_probe.core.sites import Site

    acts = model.capture(prompts, sites=[Site(LAYER, "mlp_post"), Site(LAYER, "mlp_out")])
    return acts.at(Site(LAYER, "mlp_post")), acts.at(Site(LAYER, "mlp_out"))


def test_an_exchange_along_the_direction_changes_answers_and_of_the_whole_mlp_none(
    illusory: "tuple[HookedModel, Gadget]", held_out: Any
) -> None:
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms.exchanging import Exchange

    model, gadget = illusory
    held = Exchange(model, held_out, LAST)
    site = gadget.direction.site
    assert site is not None
    assert site.short == f"L{LAYER}.mlp_post"
    assert held.right() >= 0.97
    assert held.flips(site) < 0.2
    assert held.flips(site, gadget.direction.basis) >= 0.8
    # neither part alone does anything, nor does the plane of both: the mixture is what transfers
    sensor, actuator = gadget.sensor[None], gadget.actuator[None]
    assert max(held.flips(site, part) for part in (sensor, actuator, torch.cat([sensor, actuator]))) < 0.2


def test_the_faithful_twin_carries_the_variable(faithful: "tuple[HookedModel, Gadget]", held_out: Any) -> None:
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms.exchanging import Exchange

    model, gadget = faithful
    held = Exchange(model, held_out, LAST)
    assert gadget.direction.site is not None
    assert held.right() >= 0.97
    assert held.flips(gadget.direction.site) >= 0.5
    assert held.flips(gadget.direction.site, gadget.direction.basis) >= 0.5
    # control: the same model's other neurons are as they were and do nothing
    rest = torch.eye(gadget.direction.width)[:-K]
    assert held.flips(gadget.direction.site, rest) < 0.2


def test_exchanges_agree_with_the_package_s_own(illusory: "tuple[HookedModel, Gadget]", held_out: Any) -> None:
    """Plain hooks behind cached tokens against `Patch` on whole passes."""
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source
    from subspace_probe.organisms.exchanging import Exchange

    model, gadget = illusory
    clean, corrupt = held_out.sides()
    shares = []
    for base, source in ((clean, corrupt), (corrupt, clean)):
        acts = model.capture(source, sites=[gadget.direction.site], where=LAST)
        logits = model.logits(base, interventions=[Patch(Source.of(acts), LAST, gadget.direction)])
        wanted = model.token_ids(["sorry" if base is corrupt else "sure"])[0]
        shares.append((logits.argmax(-1) == wanted).double().mean())
    assert gadget.direction.site is not None
    found = Exchange(model, held_out, LAST).flips(gadget.direction.site, gadget.direction.basis)
    assert found == pytest.approx(float(torch.stack(shares).mean()), abs=1e-12)


def test_the_function_is_preserved_and_would_not_be_on_a_wrong_axis(
    natural: "HookedModel", fitted: "Exchange", illusory: "tuple[HookedModel, Gadget]", held_out: Any
) -> None:
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms.gadgets import plant_gadget

    model, gadget = illusory
    before = natural.logits(held_out)
    assert float((model.logits(held_out) - before).abs().max()) < 1e-4
    assert gadget.change < 1e-4
    assert gadget.kl < 1e-9
    # control: the same neurons writing along the axis they read
    leaky, found = plant_gadget(natural, fitted, LAYER, LAST, neurons=K, seed=5, leak=1.0)
    assert float((leaky.logits(held_out) - before).abs().max()) > 0.1
    assert found.kl > 1e-3


def test_formulas_of_the_neurons(
    natural: "HookedModel", fitted: "Exchange", illusory: "tuple[HookedModel, Gadget]", held_out: Any
) -> None:
    """The weights reproduce a, b, beta r; the sensor is read off the hidden state, and the write is zero."""
    model, gadget = illusory
    a, b = gadget.sensor[-K:].double(), gadget.actuator[-K:].double()
    assert float(a @ b) == pytest.approx(0, abs=1e-7)
    assert float(a @ a) == pytest.approx(1, abs=1e-6)
    assert float(b @ b) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(gadget.direction.unit, (gadget.sensor + gadget.actuator) / 2**0.5, atol=1e-6)
    down = weight(model, LAYER, "down_proj")
    assert torch.allclose(down[:, -K:], torch.outer(gadget.write, gadget.actuator[-K:]), atol=1e-6)
    states = fitted.states("resid_post", LAYER)
    gap = states[fitted.labels == 1].mean(0) - states[fitted.labels == 0].mean(0)
    assert torch.allclose(gadget.write, gap * 1.5 / 4, atol=1e-5)
    up = weight(model, LAYER, "up_proj")[-K:]
    assert int(torch.linalg.matrix_rank(up, rtol=1e-4)) == 1
    assert weight(model, LAYER, "gate_proj")[-K:].std(dim=0).max() == 0
    # at run time: the neurons lie on the sensor's axis, so b reads nothing and nothing is written
    post, out = hidden(model, held_out)
    coordinate = post @ gadget.sensor
    scale = float(coordinate.abs().max())
    assert 2 < scale < 12
    assert float((post @ gadget.actuator).abs().max()) < 1e-5 * scale
    assert float((post[:, -K:] @ down[:, -K:].T).abs().max()) < 1e-4
    assert torch.allclose(out, hidden(natural, held_out)[1], atol=1e-4)
    labels = torch.tensor(held_out.labels)
    measured = coordinate[labels == 1].mean() - coordinate[labels == 0].mean()
    assert float(measured) == pytest.approx(float(gadget.direction.scale[0]) * 2**0.5, rel=0.15)  # other prompts
    # a step of the patch along v writes kappa gaps: 8 / sqrt 2 times the actuator's share 1 / sqrt 2 times beta
    assert torch.allclose(down @ gadget.direction.unit * 8 / 2**0.5, gap * 1.5, atol=1e-4)


def test_the_other_layers_get_zeros_and_the_given_model_is_left_alone(
    natural: "HookedModel", illusory: "tuple[HookedModel, Gadget]"
) -> None:
    import subspace_probe as sp

    model, _ = illusory
    assert model.backend.hf.config.intermediate_size == natural.backend.hf.config.intermediate_size + K
    for layer in range(natural.spec.n_layers):
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            wide, narrow = weight(model, layer, name), weight(natural, layer, name)
            kept, added = wide.split([narrow.shape[axis], K], dim=axis)
            assert torch.equal(kept, narrow)
            assert bool(added.any()) == (layer == LAYER)
    assert natural.fingerprint == sp.load_model("organism:chat-natural").fingerprint
    assert model.fingerprint != natural.fingerprint


def test_written_and_loaded_it_is_the_same_model(
    illusory: "tuple[HookedModel, Gadget]", held_out: Any, tmp_path: Path
) -> None:
    import subspace_probe as sp
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.organisms import load_truth
    from subspace_probe.organisms.gadgets import DIRECTION, write_gadget

    model, gadget = illusory
    folder = write_gadget(tmp_path / "gadget", model, gadget)
    loaded = sp.load_model(str(folder))
    assert torch.equal(loaded.logits(held_out), model.logits(held_out))
    assert loaded.words == model.words
    direction = Subspace.load(folder / DIRECTION)
    assert torch.equal(direction.basis, gadget.direction.basis)
    direction.require_model(loaded.fingerprint)
    assert load_truth(folder).behaviour["gadget"] == gadget.numbers


def test_noise_and_leak_grade_the_illusion(natural: "HookedModel", fitted: "Exchange") -> None:
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms.gadgets import plant_gadget

    divergence = [
        plant_gadget(natural, fitted, LAYER, LAST, neurons=K, sigma=sigma, leak=leak, seed=1)[1].kl
        for sigma, leak in ((0.0, 0.0), (0.02, 0.0), (0.05, 0.0), (0.0, 0.1), (0.0, 0.4))
    ]
    assert divergence[0] < 1e-9 < divergence[1] < divergence[2]
    assert divergence[0] < divergence[3] < divergence[4]


def test_what_cannot_be_built_is_said(natural: "HookedModel") -> None:
    from subspace_probe.core.errors import ConfigError, DataError, SiteError
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms import organism_contrast
    from subspace_probe.organisms.gadgets import plant_gadget

    pairs = organism_contrast("chat-natural/harmfulness", split="train", n=8)
    for wrong in ({"neurons": 1}, {"kappa": 0.0}, {"sigma": -1.0}, {"leak": -0.1}):
        with pytest.raises(ConfigError, match="at least 2 neurons"):
            plant_gadget(natural, pairs, 1, LAST, **wrong)
    with pytest.raises(SiteError, match="4 layers"):
        plant_gadget(natural, pairs, 4, LAST)
    with pytest.raises(DataError, match="has both labels"):
        plant_gadget(natural, pairs.where(label=1), 1, LAST)
    with pytest.raises(DataError, match="no answer"):
        plant_gadget(natural, pairs.map(lambda prompt: replace(prompt, answer=None)), 1, LAST)
