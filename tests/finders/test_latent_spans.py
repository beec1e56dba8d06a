"""Latents of a dictionary whose latents are known: coordinates, some of them on in one class only."""

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.activations import Activations
    from subspace_probe.dictionaries import SparseAutoencoder

D = 16
"""Latent i is coordinate i: 0-3 on in label 1, 4-7 in label 0, 8-13 in both, 14 and 15 never."""


def _dictionary() -> "SparseAutoencoder":
    from subspace_probe.dictionaries import Configuration, SparseAutoencoder

    eye = torch.eye(D)
    weights = {"W_enc": eye, "W_dec": eye, "b_enc": torch.zeros(D), "b_dec": torch.zeros(D)}
    return SparseAutoencoder(Configuration("standard", D, D), weights)


def _states(informative: bool = True) -> "Activations":
    from tests.planted import activations

    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    x = torch.randn(400, D, generator=draw).abs() + 1.0
    told = labels if informative else torch.randint(2, (400,), generator=draw)
    x[told == 0, :4], x[told == 1, 4:8], x[:, 14:] = 0, 0, 0
    return activations(x, labels)


def test_both_ends_dead_latents_and_spans() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.latent_spans import latent_spans
    from subspace_probe.linalg import overlap

    found = latent_spans(_dictionary(), _states(), Site(0), k=4, null_draws=40)
    assert sorted(found.top.tolist()) == [0, 1, 2, 3]
    assert sorted(found.bottom.tolist()) == [4, 5, 6, 7]
    assert found.dead == 2
    assert not bool(found.ranked[14:].any())
    assert overlap(found.relevant.basis, torch.eye(D)[:4]) == pytest.approx(1.0)
    assert overlap(found.irrelevant.basis, torch.eye(D)[4:8]) == pytest.approx(1.0)
    assert torch.allclose(found.angles, torch.full((4,), torch.pi / 2, dtype=torch.float64))
    assert bool((found.score[found.top] > found.null_95).all())
    # the control: labels that say nothing about the states
    assert float(latent_spans(_dictionary(), _states(False), Site(0), k=4, null_draws=40).score.max()) < 0.5


def test_spans_that_overlap_are_made_orthogonal_on_request() -> None:
    from dataclasses import replace

    from subspace_probe.core.sites import Site
    from subspace_probe.finders.latent_spans import latent_spans

    sae = _dictionary()
    leaning = torch.eye(D)
    leaning[4:8, :4] = torch.eye(4)  # what is irrelevant is half relevant
    sae = replace(sae, weights={**sae.weights, "W_dec": leaning})
    plain, apart = (latent_spans(sae, _states(), Site(0), k=4, disjoint=way) for way in (False, True))
    assert torch.allclose(plain.angles, torch.full((4,), torch.pi / 4, dtype=torch.float64), atol=1e-6)
    assert float((plain.relevant.basis @ plain.irrelevant.basis.T).abs().max()) > 0.3
    assert float((apart.relevant.basis @ apart.irrelevant.basis.T).abs().max()) < 1e-6
    assert torch.allclose(apart.angles, plain.angles)


def test_too_many_latents_are_refused() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.latent_spans import latent_spans

    with pytest.raises(ConfigError, match="14 of 16 are active"):
        latent_spans(_dictionary(), _states(), Site(0), k=8)
