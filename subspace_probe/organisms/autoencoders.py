"""The sparse autoencoders that come with an organism: how they were trained, and where they lie.

They are ordinary folders that `load_sae` reads. Trained on the organism's own broad text, all skills alike, and on no
study's prompts in particular.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import unknown
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import PROMPT
from subspace_probe.dictionaries.training import Training, train_sae
from subspace_probe.organisms import organism_contrast

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel

AUTOENCODERS: Final[dict[str, dict[int, str]]] = {"chat": {1: "chat-sae/L1", 2: "chat-sae/L2", 3: "chat-sae/L3"}}
"""By organism and layer (resid_post); folders under ``weights``."""

TRAINING: Final = Training("topk", d_sae=256, k=16, steps=1500, batch_size=512, lr=2e-3)
_TEXTS: Final = ("facts", "knob", "ioi", "repeat", "kinds", "requests", "judgement")
_PROMPTS: Final = 300
_WEIGHTS: Final = Path(__file__).parent / "weights"


def autoencoder_paths(name: str) -> dict[int, Path]:
    """The folders of an organism's autoencoders by layer.

    Raises:
        UnknownName: an organism without any.
    """
    if name not in AUTOENCODERS:
        raise unknown("organism with autoencoders", name, AUTOENCODERS)
    return {layer: _WEIGHTS / folder for layer, folder in AUTOENCODERS[name].items()}


def train_autoencoders(model: "HookedModel", name: str, out: str | Path, *, progress: bool = True) -> list[Path]:
    """Train an organism's autoencoders again, a folder a layer.

    The same machine gives the same weights; what is on record about each (`explained_variance`, `l0`, on held-out
    prompts) is measured again.

    Args:
        model: the organism, loaded.
        name: its name in ``AUTOENCODERS``.

    Raises:
        UnknownName: an organism without autoencoders.
    """
    layers = autoencoder_paths(name)
    shown = [organism_contrast(f"{name}/{skill}", split="train", n=_PROMPTS).prompts for skill in _TEXTS]
    prompts = tuple(prompt for part in shown for prompt in part)
    broad = Contrast(f"{name}/all skills", prompts, tuple(row % 2 for row in range(len(prompts))))
    sites = [Site(layer) for layer in layers]
    acts = model.capture(broad, sites=sites, where=PROMPT)
    return [
        train_sae(acts, site, TRAINING, progress=progress).save(Path(out) / folder.name)
        for site, folder in zip(sites, layers.values(), strict=True)
    ]
