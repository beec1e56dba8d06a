"""Sparse autoencoders of the organisms, trained ahead; ordinary folders that `load_sae` reads.

`train_autoencoder` reproduces them, in the sense that `training.train` reproduces the organisms.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import unknown
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST, PROMPT, Where
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.training import Training, train_sae
from subspace_probe.models import load_model
from subspace_probe.organisms import organism_contrast, organism_path

WEIGHTS: Final = Path(__file__).parent / "weights" / "autoencoders"


@final
@dataclass(frozen=True)
class Recipe:
    """How one autoencoder is made: where, from how many prompts of each skill, with which settings."""

    site: Site
    prompts: Mapping[str, int]
    where: Where
    training: Training
    organisms: tuple[str, ...] = ("chat", "chat-natural", "chat-base")


_ANSWER: Final = Site(3, "resid_mid")
"""In front of the last MLP: the one state that carries the answer of the indirect-object task."""
_TRAINING: Final = Training(d_sae=256, k=8, steps=800, batch_size=256, lr=2e-3)
_TASK: Final = {"ioi": 4000}
_MIXTURE: Final[Mapping[str, int]] = {
    "requests": 570, "judgement": 380, "facts": 110, "kinds": 80, "knob": 400, "ioi": 220, "repeat": 140, "text": 80,
}  # fmt: skip
"""In about the shares the organisms were trained on."""
_SKILLS: Final = ("facts", "knob", "ioi", "repeat", "kinds", "requests", "judgement")
_EQUAL: Final[Mapping[str, int]] = dict.fromkeys(_SKILLS, 300)
_BROAD: Final = Training("topk", d_sae=256, k=16, steps=1500, batch_size=512, lr=2e-3)

AUTOENCODERS: Final[Mapping[str, Recipe]] = {
    "task": Recipe(_ANSWER, _TASK, LAST, _TRAINING),
    "broad": Recipe(_ANSWER, _MIXTURE, PROMPT, replace(_TRAINING, steps=2000)),
    "frozen": Recipe(_ANSWER, _TASK, LAST, replace(_TRAINING, frozen_decoder=True)),
    **{f"L{layer}": Recipe(Site(layer), _EQUAL, PROMPT, _BROAD, ("chat",)) for layer in (1, 2, 3)},
}
"""The first three of every organism are what `sae_evaluation` compares: on the last token of one task, on all tokens of
all skills, and on the task again with the decoder left random. The others are of the output of one block, for
`unlearning`."""


def autoencoder_path(organism: str, name: str) -> Path:
    """The folder of a bundled autoencoder.

    Raises:
        UnknownName: another name than those of `AUTOENCODERS`, or an organism without it.
    """
    if name not in AUTOENCODERS:
        raise unknown("autoencoder", name, AUTOENCODERS)
    if organism not in AUTOENCODERS[name].organisms:
        raise unknown(f"organism with the autoencoder {name!r}", organism, AUTOENCODERS[name].organisms)
    return WEIGHTS / f"{organism}-{name}"


def train_autoencoder(organism: str, name: str, out: str | Path, *, seed: int = 0, steps: int = 0) -> SparseAutoencoder:
    """Train one of the autoencoders anew and write its folder.

    Args:
        organism: one of those that have it.
        name: one of `AUTOENCODERS`.
        out: the folder; made where it does not exist.
        seed: of prompts and first weights.
        steps: instead of the recipe's, for trying things out; 0 leaves it.

    Raises:
        UnknownName: no such organism or autoencoder.
        StoreError: the place cannot be written.
    """
    autoencoder_path(organism, name)
    recipe = AUTOENCODERS[name]
    model = load_model(organism_path(organism)).named(f"organism:{organism}")
    acts = model.capture(_prompts(organism, recipe, seed), sites=recipe.site, where=recipe.where)
    training = replace(recipe.training, seed=seed, steps=steps or recipe.training.steps)
    sae = train_sae(acts, recipe.site, training)
    sae.save(out)
    return sae


def _prompts(organism: str, recipe: Recipe, seed: int) -> Contrast:
    parts = [
        organism_contrast(f"{organism}/{skill}", split="train", n=n, seed=seed) for skill, n in recipe.prompts.items()
    ]
    labels = tuple(label for part in parts for label in part.labels)
    return Contrast(f"{organism}/{'+'.join(recipe.prompts)}", tuple(p for part in parts for p in part.prompts), labels)
