"""Sparse autoencoders of the organisms' answer state, trained ahead: what `sae_evaluation` compares.

Three of each organism, at the residual stream in front of the last MLP: trained on the last token of indirect-object
prompts; on all tokens of the mixture the organism was trained on; and on the task again with its decoder left random.
`train_autoencoder` reproduces them, in the sense that `training.train` reproduces the organisms.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import unknown
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST, PROMPT
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.training import Training, train_sae
from subspace_probe.models import load_model
from subspace_probe.organisms import organism_contrast, organism_path

WEIGHTS: Final = Path(__file__).parent / "weights" / "autoencoders"
SITE: Final = Site(3, "resid_mid")
ORGANISMS: Final = ("chat", "chat-natural", "chat-base")

_TRAINING: Final = Training(d_sae=256, k=8, steps=800, batch_size=256, lr=2e-3)
AUTOENCODERS: Final[Mapping[str, Training]] = {
    "task": _TRAINING,
    "broad": replace(_TRAINING, steps=2000),
    "frozen": replace(_TRAINING, frozen_decoder=True),
}
"""What each is trained with. "broad" sees all tokens of all skills, the other two the last token of one."""

_TASK_PROMPTS: Final = 4000
_MIXTURE: Final[Mapping[str, int]] = {
    "requests": 570, "judgement": 380, "facts": 110, "kinds": 80, "knob": 400, "ioi": 220, "repeat": 140, "text": 80,
}  # fmt: skip
"""Prompts of each skill, in about the shares the organisms were trained on."""


def autoencoder_path(organism: str, name: str) -> Path:
    """The folder of a bundled autoencoder.

    Raises:
        UnknownName: an organism without autoencoders, or another name than those of `AUTOENCODERS`.
    """
    if organism not in ORGANISMS:
        raise unknown("organism with autoencoders", organism, ORGANISMS)
    if name not in AUTOENCODERS:
        raise unknown("autoencoder", name, AUTOENCODERS)
    return WEIGHTS / f"{organism}-{name}"


def broad_prompts(organism: str, *, split: str = "train", seed: int = 0) -> Contrast:
    """Prompts of all skills, in about the shares the organism was trained on."""
    parts = [organism_contrast(f"{organism}/{skill}", split=split, n=n, seed=seed) for skill, n in _MIXTURE.items()]
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    return Contrast(f"{organism}/mixture", prompts, tuple(label for part in parts for label in part.labels))


def train_autoencoder(organism: str, name: str, out: str | Path, *, seed: int = 0, steps: int = 0) -> SparseAutoencoder:
    """Train one of the autoencoders anew and write its folder.

    Args:
        organism: "chat", "chat-natural" or "chat-base".
        name: one of `AUTOENCODERS`.
        out: the folder; made where it does not exist.
        seed: of prompts and first weights.
        steps: instead of the recipe's, for trying things out; 0 leaves it.

    Raises:
        UnknownName: no such organism or autoencoder.
        StoreError: the place cannot be written.
    """
    autoencoder_path(organism, name)
    training = replace(AUTOENCODERS[name], seed=seed, steps=steps or AUTOENCODERS[name].steps)
    model = load_model(organism_path(organism)).named(f"organism:{organism}")
    if name == "broad":
        acts = model.capture(broad_prompts(organism, seed=seed), sites=SITE, where=PROMPT)
    else:
        prompts = organism_contrast(f"{organism}/ioi", split="train", n=_TASK_PROMPTS, seed=seed)
        acts = model.capture(prompts, sites=SITE, where=LAST)
    sae = train_sae(acts, SITE, training)
    sae.save(out)
    return sae
