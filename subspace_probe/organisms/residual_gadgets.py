"""An illusion in the residual stream: a direction changes answers there, and the whole state does not.

The residual stream is a bottleneck, so no direction of it is provably unread. But where a token's state is not used for
an answer *yet*, behind a block below the one that brings the variable, the same mixture of sensor and actuator works: K
neurons write the variable along a random unit vector w (the sensor, which later blocks make nothing of), and r, along
which a later block will write the variable itself, is the actuator, still silent. v = (w + r) / sqrt(2) copies one to
the other. A patch of the whole state moves w, and changes no answer.

With the neurons of ``gadgets``, silu(g . y) (a_j p . y), and columns beta w a^T, where beta = 2 kappa gap / 8 and `gap`
is the class gap along r where the variable is used: an exchange along v writes kappa gap r. The neurons do write, so
the function is only nearly preserved; the certificate is what counts. Nothing splits into row and null space here:
what shows the illusion is that the state which contains the direction does less than the direction.
"""

import torch
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms.exchanging import Exchange, oriented
from subspace_probe.organisms.gadgets import (
    Gadget,
    check_settings,
    difference_from,
    reading,
    ridge_fits,
    sign_share,
    widened,
)


def plant_residual_gadget(
    model: HookedModel,
    pairs: Contrast | Exchange,
    layer: int,
    where: Where,
    *,
    neurons: int = 16,
    kappa: float = 0.8,
    seed: int = 0,
) -> tuple[HookedModel, Gadget]:
    """A copy of a model with an illusory direction at resid_post of a block, as `plant_gadget` makes one at an MLP.

    Args:
        model: Llama-shaped; it is left as it is.
        pairs: minimal pairs with answers, to fit on.
        layer: behind which the direction lies; the variable has to be used behind the next one.
        where: one token a prompt.
        neurons: K, at least 2.
        kappa: what an exchange along v writes, in units of the gap behind the next block. Above 1 the model errs.
        seed: of w and a.

    Raises:
        ConfigError: another architecture; settings outside their range; the last layer.
        DataError: pairs that are not complete.
    """
    check_settings(model, layer, neurons, kappa=kappa)
    layer = Site(layer).resolve(model.spec.n_layers).layer
    if layer + 1 == model.spec.n_layers:
        raise ConfigError("Behind the last block nothing brings the variable later. Choose an earlier layer.")
    seen = pairs if isinstance(pairs, Exchange) else Exchange(model, pairs, where)
    gate, reader = ridge_fits(seen, layer)
    states, labels = seen.states("resid_post", layer + 1).double(), seen.labels
    difference = states[labels == 1].mean(0) - states[labels == 0].mean(0)
    gap = difference.norm()
    r = difference / gap
    generator = torch.Generator().manual_seed(seed)
    a = _unit(torch.randn(neurons, generator=generator, dtype=torch.float64))
    drawn = torch.randn(len(r), generator=generator, dtype=torch.float64)
    w = _unit(drawn - (drawn @ r) * r)
    write = w * gap * (2 * kappa / 8)
    rows = {"gate_proj": gate.expand(neurons, -1), "up_proj": a[:, None] * reader, "down_proj": write[:, None] * a}
    changed = widened(model, layer, rows)
    moved = seen.states("resid_post", layer).double() + _written(seen, layer, rows)
    direction = oriented(
        (w + r) / 2**0.5, moved, labels, model=changed, site=Site(layer), where=where, finder="planted"
    )
    gadget = Gadget(
        direction, w.float(), r.float(), write.float(), neurons, kappa, 0.0, 0.0, False, seed,
        **difference_from(changed, seen), read=sign_share(reading(seen, layer) @ reader, labels),
    )  # fmt: skip
    return changed, gadget


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def _written(seen: Exchange, layer: int, rows: dict[str, Tensor]) -> Tensor:
    """What the neurons add to the stream, by their formula."""
    y = reading(seen, layer)
    hidden = torch.nn.functional.silu(y @ rows["gate_proj"].T) * (y @ rows["up_proj"].T)
    return hidden @ rows["down_proj"].T
