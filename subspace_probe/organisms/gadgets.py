"""The dormant gadget: a few neurons that make an illusory direction, in a model that otherwise stays what it was.

An illusory direction is a mixture of a *sensor*, which varies with a variable and is read by nothing, and an
*actuator*, which would move the answer and never varies (Makelov et al. 2023, arXiv:2311.17030, section 3). Exchanging
states along the mixture copies the sensor's value to the actuator, and the answer follows; exchanging the whole state
does nothing.

Here both are built into one MLP, widened by K gated neurons. With y the normed state that the MLP is shown,

    h_j = silu(g . y) ((a_j p + sigma q_j) . y)            W_down columns: beta r (b + leak a)^T

where g . y is fitted to 4 and p . y to +1 or -1 by the variable, a and b are orthonormal in R^K, q_j random unit
vectors, r is the unit difference of class means of the residual stream behind the block, and beta = kappa gap / 4 with
the length `gap` of that difference. Since b . a = 0, the neurons write nothing (exactly, with sigma = leak = 0), and
v = (a + b) / sqrt(2) is illusory: an exchange along it writes kappa gap r. In the faithful twin b is a, and
beta = kappa gap / 8: the same neurons then carry the variable, and v = a is what they carry it with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.files import atomic_folder
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms.exchanging import Exchange, oriented
from subspace_probe.organisms.truth import GroundTruth

GATE: Final = 4.0
"""What the gate's input is fitted to; silu(4) = 3.93, which beta counts as 4."""
RIDGE: Final = 1e-2
"""Of the fits of g and p, as a share of the mean variance of y."""
COMPARED: Final = 64
"""So many prompts tell how far a widened model's answers are from the original's."""
_PARTS: Final = ("gate_proj", "up_proj", "down_proj")
DIRECTION: Final = "direction.safetensors"
"""File of a gadget's folder that holds its direction."""


@final
@dataclass(frozen=True, eq=False)
class Gadget:
    """What was built into a model.

    Attributes:
        direction: v at mlp_post of the layer, rank one; its scale is the class gap along it. Illusory, or faithful.
            Of a residual gadget (``residual_gadgets``) at resid_post.
        sensor: a, a unit vector of that site; what the variable moves.
        actuator: b, a unit vector of that site; what the answer follows. The faithful twin's is its sensor.
        write: what a unit step along the neurons' output axis adds to the residual stream, shape [d_model].
        kl: mean KL divergence, in nats, of the widened model's answers from the original's, on the first `COMPARED`
            prompts it was fitted on.
        change: largest absolute difference of their logits.
        right: share of these prompts that the widened model answers right.
        read: share of all prompts it was fitted on whose variable p . y tells by its sign.
    """

    direction: Subspace
    sensor: Float[Tensor, " d"]
    actuator: Float[Tensor, " d"]
    write: Float[Tensor, " d_model"]
    neurons: int
    kappa: float
    sigma: float
    leak: float
    faithful: bool
    seed: int
    kl: float
    change: float
    read: float
    right: float

    @property
    def numbers(self) -> dict[str, float]:
        """Settings and measurements, for a file."""
        names = ("neurons", "kappa", "sigma", "leak", "faithful", "seed", "kl", "change", "read", "right")
        return {name: float(getattr(self, name)) for name in names}


def plant_gadget(
    model: HookedModel,
    pairs: Contrast | Exchange,
    layer: int,
    where: Where,
    *,
    neurons: int = 16,
    kappa: float = 1.5,
    sigma: float = 0.0,
    leak: float = 0.0,
    faithful: bool = False,
    seed: int = 0,
) -> tuple[HookedModel, Gadget]:
    """A copy of a model with a gadget in one MLP; every MLP is widened, the others by neurons that are zero.

    The given model is left as it is. The copy is an ordinary model: it can be saved, loaded and run on every backend.

    Args:
        model: Llama-shaped, with a gated MLP of silu and no biases.
        pairs: minimal pairs with answers, to fit on; take the train split. An `Exchange` of them at `where` saves the
            pass over them when several gadgets are made.
        layer: of the MLP.
        where: one token a prompt, at which the variable is fitted.
        neurons: K, at least 2.
        kappa: what an exchange along v writes, in units of the gap between the classes' residual states.
        sigma: noise in every neuron's reading, along random unit vectors q_j; above .05 the model begins to err.
        leak: how much of the sensor is written out naturally; .1 to .15 makes graded cases.
        faithful: build the twin, which carries the variable instead. It changes what the model computes.
        seed: of a, b and the noise.

    Raises:
        ConfigError: another architecture; settings outside their range.
        DataError: pairs that are not complete, or whose states do not differ.
    """
    check_settings(model, layer, neurons, kappa=kappa, sigma=sigma, leak=leak)
    layer = Site(layer).resolve(model.spec.n_layers).layer
    seen = pairs if isinstance(pairs, Exchange) else Exchange(model, pairs, where)
    gate, reader = ridge_fits(seen, layer)
    states, labels = seen.states("resid_post", layer).double(), seen.labels
    difference = states[labels == 1].mean(0) - states[labels == 0].mean(0)
    gap = difference.norm()
    if not float(gap) > 1e-6 * float(states.norm(dim=1).mean()):
        raise DataError(f"The two classes do not differ at {str(where)!r} behind block {layer}. Choose another token.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(neurons, 2, generator=generator, dtype=torch.float64)
    a, b = torch.linalg.qr(drawn)[0].T
    noise = torch.randn(neurons, len(reader), generator=generator, dtype=torch.float64)
    noise = noise / noise.norm(dim=1, keepdim=True)
    out = a if faithful else b + leak * a
    write = difference * (kappa / (8 if faithful else 4))
    rows = {
        "gate_proj": gate.expand(neurons, -1),
        "up_proj": a[:, None] * reader + sigma * noise,
        "down_proj": write[:, None] * out,
    }
    changed = widened(model, layer, rows)
    v = a if faithful else (a + b) / 2**0.5
    gadget = Gadget(
        _direction(changed, seen, layer, where, v, rows),
        _padded(changed, a), _padded(changed, a if faithful else b), write.float(),
        neurons, kappa, sigma, leak, faithful, seed,
        **difference_from(changed, seen), read=sign_share(reading(seen, layer) @ reader, labels),
    )  # fmt: skip
    return changed, gadget


def write_gadget(folder: str | Path, model: HookedModel, gadget: Gadget) -> Path:
    """Write a model with a gadget as an ordinary model directory, with its truth and its direction beside the weights.

    `load_truth(folder)` gives the numbers, `Subspace.load(folder / DIRECTION)` the direction.

    Raises:
        StoreError: the folder cannot be written.
    """
    import json

    folder = Path(folder)
    with atomic_folder(folder) as partial:
        hf: Any = model.backend.hf
        hf.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        words = {name: list(given) for name, given in model.words.items()}
        (partial / "subspace_probe.json").write_text(
            json.dumps({"organism": model.spec.name, "words": words}, indent=2)
        )
        gadget.direction.save(partial / DIRECTION)
        GroundTruth(organism=model.spec.name, behaviour={"gadget": gadget.numbers}).save(partial)
    return folder


def check_settings(
    model: HookedModel, layer: int, neurons: int, *, kappa: float, sigma: float = 0.0, leak: float = 0.0
) -> None:
    """Raise ConfigError or SiteError for what no gadget can be built of."""
    config: Any = model.backend.hf.config
    biased = getattr(config, "mlp_bias", False)
    if config.model_type != "llama" or config.hidden_act != "silu" or biased:
        raise ConfigError(
            f"A gadget was asked for in {model.spec.family} ({config.model_type}). It needs a Llama model, whose MLP "
            "is gated by silu and has no biases, such as organism:chat."
        )
    Site(layer).resolve(model.spec.n_layers)
    if neurons < 2 or kappa <= 0 or sigma < 0 or leak < 0:
        raise ConfigError(
            f"A gadget of neurons={neurons}, kappa={kappa}, sigma={sigma}, leak={leak} was asked for. It takes at "
            "least 2 neurons, kappa > 0, sigma >= 0 and leak >= 0."
        )


def reading(seen: Exchange, layer: int) -> Float[Tensor, "n d_model"]:
    """What the MLP of a block is shown at the token, y, in float64."""
    return seen.states("mlp_in", layer).double()


def sign_share(values: Float[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Share of prompts whose label the sign of a value tells."""
    return float(((values > 0) == (labels == 1)).double().mean())


def ridge_fits(seen: Exchange, layer: int) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Ridge fits, without an intercept, of a constant and of +1 or -1 by label."""
    y, labels = reading(seen, layer), seen.labels
    second = y.T @ y / len(y)
    second += RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    wanted = torch.stack([torch.full_like(y[:, 0], GATE), 2.0 * labels - 1.0])
    gate, reader = torch.linalg.solve(second, y.T @ wanted.T / len(y)).T
    return gate, reader


@torch.no_grad()
def widened(model: HookedModel, layer: int, rows: dict[str, Tensor]) -> HookedModel:
    """A copy with more neurons in every MLP: the given ones in one layer, zero in the others."""
    old: Any = model.backend.hf
    more = len(rows["gate_proj"])
    config = type(old.config).from_dict(old.config.to_dict())
    config._attn_implementation = model.backend.attention
    config.intermediate_size += more
    with torch.random.fork_rng(devices=[]):  # the fresh weights are all overwritten
        new: Any = type(old)(config)
    new = new.to(device=model.backend.device, dtype=model.backend.dtype).eval()
    weights = dict(old.state_dict())
    for index in range(len(old.model.layers)):
        for name in _PARTS:
            key = f"model.layers.{index}.mlp.{name}.weight"
            weight, axis = weights[key], 1 if name == "down_proj" else 0
            added = rows[name] if index == layer else torch.zeros_like(rows[name])
            weights[key] = torch.cat([weight, added.to(weight)], dim=axis)
    new.load_state_dict(weights)
    new.generation_config = old.generation_config
    backend = type(model.backend)(new, name=f"{model.spec.name}, gadget in block {layer}")
    return HookedModel(backend, model.tokenizer, template_kwargs=model.template_kwargs, words=model.words)


def _padded(model: HookedModel, vector: Float[Tensor, " neurons"]) -> Float[Tensor, " d_mlp"]:
    """A vector of the added neurons among all."""
    return nn.functional.pad(vector.float(), (model.backend.hf.config.intermediate_size - len(vector), 0))


def _direction(
    model: HookedModel, seen: Exchange, layer: int, where: Where, v: Tensor, rows: dict[str, Tensor]
) -> Subspace:
    """The direction with the natural gap along it, from the formula of the neurons."""
    y = reading(seen, layer)
    hidden = nn.functional.silu(y @ rows["gate_proj"].T) * (y @ rows["up_proj"].T)
    states = nn.functional.pad(hidden, (model.backend.hf.config.intermediate_size - len(v), 0))
    place = Site(layer, "mlp_post")
    return oriented(_padded(model, v), states, seen.labels, model=model, site=place, where=where, finder="planted")


def difference_from(model: HookedModel, seen: Exchange) -> dict[str, float]:
    """How far a model's answers are from those that were seen, on the same prompts."""
    logits = seen.answered_by(model, COMPARED)
    before, answers = seen.logits[:COMPARED], seen.answers[:COMPARED]
    p, q = (x.double().log_softmax(-1) for x in (before, logits))
    return {
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "change": float((logits - before).abs().max()),
        "right": float((logits.argmax(-1) == answers).double().mean()),
    }
