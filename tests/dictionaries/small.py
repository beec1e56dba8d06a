"""Small sparse autoencoders with random weights."""

from typing import Any

import torch


def small(architecture: str = "standard", d_in: int = 12, d_sae: int = 20, *, seed: int = 0, **options: Any):
    """An autoencoder with every tensor random, and decoder rows of unequal length."""
    from subspace_probe.dictionaries import Configuration, SparseAutoencoder

    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    weights = {
        "W_enc": normal(d_in, d_sae) / d_in**0.5,
        "W_dec": normal(d_sae, d_in) * torch.linspace(0.3, 2, d_sae)[:, None] / d_in**0.5,
        "b_dec": normal(d_in) * 0.5,
    }
    if architecture == "gated":
        weights |= {name: normal(d_sae) * 0.3 for name in ("b_gate", "r_mag", "b_mag")}
    else:
        weights["b_enc"] = normal(d_sae) * 0.3
    if architecture == "jumprelu":
        weights["threshold"] = torch.rand(d_sae, generator=draw) * 0.5
    if architecture == "topk":
        options.setdefault("k", 5)
    options.setdefault("metadata", {"hook_name": "blocks.1.hook_resid_post", "model_name": "none"})
    own: Any = options
    return SparseAutoencoder(Configuration(architecture, d_in, d_sae, **own), weights)  # pyright: ignore[reportArgumentType]


def dictionary(d_in: int, d_sae: int, *, seed: int = 0, bias: float = 0.5, site: str = "blocks.0.hook_resid_post"):
    """Unit decoder rows, each read by itself: a latent is active where its row's coordinate exceeds `bias`."""
    from subspace_probe.dictionaries import Configuration, SparseAutoencoder

    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
    rows /= rows.norm(dim=1, keepdim=True)
    weights = {"W_enc": rows.T.clone(), "W_dec": rows, "b_dec": torch.zeros(d_in), "b_enc": torch.full((d_sae,), -bias)}
    return SparseAutoencoder(Configuration("standard", d_in, d_sae, metadata={"hook_name": site}), weights)


def states(n: int = 64, d: int = 12, *, seed: int = 1) -> torch.Tensor:
    """Rows with a common mean."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3
