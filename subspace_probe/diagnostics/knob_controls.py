"""What any other direction would do in the place of a knob: the same prompts moved as far, along other directions."""

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.subspaces import Subspace
from subspace_probe.interventions.knob import KnobClamp
from subspace_probe.linalg.bases import complement


def orthogonal_directions(subspace: Subspace, draws: int, *, seed: int) -> list[Subspace]:
    """Uniformly random directions of the orthogonal complement, at the same site.

    In few dimensions a random direction is never far from orthogonal to any other, nor ever quite orthogonal: at d = 64
    it has a cosine of .12 with the knob, and a large value clamped along it turns the knob too.

    Args:
        subspace: of any rank below its width.
        draws: how many.
    """
    outside = complement(subspace.basis.double().cpu())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(draws, len(outside), generator=generator, dtype=torch.float64) @ outside
    return [Subspace.span(row / row.norm(), site=subspace.site, where=subspace.where) for row in drawn]


def orthogonal_clamps(clamp: KnobClamp, states: Float[Tensor, "n d"], draws: int, *, seed: int) -> list[KnobClamp]:
    """The clamp along random directions orthogonal to its own, each state moved exactly as far as by the clamp.

    Along v the state h is set to v . h + (c - u . h), so that the step has the length and the sign that it has along
    the knob u; only its direction is another.

    Args:
        clamp: of a direction, to exactly one value for all prompts or one for each.
        states: of the prompts it will act on, at its site and token, shape [n, d].
        draws: how many.

    Raises:
        ConfigError: a clamp of several dimensions, with a bound, or without a value.
    """
    if clamp.subspace.rank != 1 or clamp.bound != "exactly" or clamp.value is None:
        raise ConfigError(
            f"Orthogonal controls were asked for {clamp!r}. They take a direction that is set to exactly a value."
        )
    wide = states.double().cpu()
    value = torch.as_tensor(clamp.value, dtype=torch.float64).flatten()
    step = value - wide @ clamp.subspace.readers[0].double().cpu()
    found: list[KnobClamp] = []
    for other in orthogonal_directions(clamp.subspace, draws, seed=seed):
        values = (wide @ other.unit.double() + step).float()
        found.append(KnobClamp(other, values, clamp.site or clamp.subspace.site, clamp.where, when=clamp.when))
    return found
