"""Training code: the forward pass it uses is the model's, a seed decides everything, bad input is refused early."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch


def fresh(seed: int = 0) -> Any:
    from subspace_probe.organisms.training import build_chat

    return build_chat(seed)


@torch.no_grad()
def test_training_forward_equals_the_hugging_face_model() -> None:
    from subspace_probe.organisms.batches import Mixture
    from subspace_probe.organisms.network import N_LAYERS, Network
    from subspace_probe.organisms.training import RECIPES

    model = fresh()
    batch = Mixture("train", RECIPES["chat"].counts, stock=200, aligned=True, seed=0).draw()
    network = Network(model)
    outputs = [network.embed(batch.ids)]
    for layer in range(N_LAYERS):
        outputs.append(network.block(layer, outputs[-1]))
    row = torch.arange(len(batch))
    assert torch.allclose(network.logits(outputs[-1]), model(batch.ids).logits, atol=1e-5)
    at = network.block_at(N_LAYERS - 1, outputs[-2], batch.t_post)
    assert torch.allclose(at, outputs[-1][row, batch.t_post], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat", "chat-natural"])
def test_a_seed_decides_every_weight(name: str) -> None:
    from subspace_probe.organisms.batches import Mixture
    from subspace_probe.organisms.training import RECIPES, fit

    recipe = replace(RECIPES[name], plant_from=0)
    before = torch.random.get_rng_state()

    def trained(seed: int) -> torch.Tensor:
        model = fresh()
        mixture = Mixture("train", recipe.counts, stock=200, aligned=recipe.aligned, seed=seed)
        fit(model, recipe, mixture, steps=2, seed=seed, progress=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = trained(0)
    assert torch.isfinite(first).all()
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_planted_vectors_are_orthonormal_and_fixed() -> None:
    from subspace_probe.organisms import load_truth
    from subspace_probe.organisms.planting import planted_vectors

    vectors = torch.stack(list(planted_vectors().values()))
    assert torch.allclose(vectors @ vectors.T, torch.eye(len(vectors)), atol=1e-6)
    for planted in load_truth("chat").variables:
        assert torch.allclose(planted.vector, planted_vectors()[planted.name], atol=1e-6)  # type: ignore[index]


def test_bad_input_is_refused_before_training(tmp_path: Path) -> None:
    from subspace_probe.core.errors import ConfigError, StoreError, UnknownName
    from subspace_probe.organisms.training import train

    with pytest.raises(UnknownName, match="chat-base"):
        train("chat-bose", tmp_path / "a")
    with pytest.raises(ConfigError, match="At least 1"):
        train("chat", tmp_path / "b", steps=0)
    (tmp_path / "c").write_text("a file")
    with pytest.raises(StoreError):
        train("chat", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
