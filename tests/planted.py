"""Generated activations with a planted direction, for every test of finders: the answer is known exactly."""

import torch
from torch import Tensor


def planted(
    n: int = 400,
    d: int = 48,
    gap: float = 3.0,
    *,
    seed: int = 0,
    shift: float = 0.0,
    spread: tuple[float, float] = (0.2, 2.0),
) -> tuple[Tensor, ...]:
    """Rows with noise of unequal variance and a gap along a unit vector: (x [n d], labels [n], unit [d])."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(d, generator=generator)
    unit /= unit.norm()
    labels = torch.arange(n) % 2
    noise = torch.randn(n, d, generator=generator) * torch.linspace(*spread, d)
    return noise + gap * labels[:, None] * unit + shift, labels, unit


def activations(x: Tensor, labels: Tensor, **factors: Tensor):
    """Rows as `Activations` at one site, pairs in order."""
    from subspace_probe.core.activations import Activations, MemoryRows
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST

    n = len(x)
    contrast = Contrast(
        "planted",
        tuple(Prompt(text=f"prompt {i}") for i in range(n)),
        tuple(labels.tolist()),
        pairs=tuple(i // 2 for i in range(n)),
        factors={name: tuple(values.tolist()) for name, values in factors.items()},
    )
    return Activations(MemoryRows({Site(0): x}), contrast, torch.arange(n), torch.zeros(n, dtype=torch.long), LAST)
