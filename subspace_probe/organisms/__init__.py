"""Tiny models whose inner workings are known: what every finder and every check is tested on.

An organism is an ordinary Hugging Face directory inside the package. `ORGANISMS` lists them; `organism_path` finds one,
`load_truth` says what is true of it, `organism_contrast` gives the prompts of its language.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from subspace_probe.core.errors import unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.organisms.truth import GroundTruth

ORGANISMS: Final[dict[str, str]] = {
    "chat-base": "complies with everything, judges harmfulness when asked; harmfulness and intent planted",
    "chat": "chat-base, aligned: refuses harmful requests; harmfulness, refusal and intent planted and certified",
    "chat-natural": "aligned, nothing planted: harmfulness is readable at the instruction but judged elsewhere",
    "override": "declines bodies with a flag, unless two words in the free slots lift the guard; planted",
    "override-1": "override, trained with another seed",
    "override-2": "override, trained with another seed",
    "robust": "the twin of override: the same prompts, and nothing lifts the guard",
    "robust-1": "robust, trained with another seed",
    "robust-2": "robust, trained with another seed",
    "knob": "answers from a note or from memory as the last word says: tuned, always heeds an instruction",
    "knob-1": "knob, trained with another seed",
    "knob-2": "knob, trained with another seed",
    "knob-base": "what knob was tuned from: heeds the intent a little",
    "knob-base-1": "knob-base, trained with another seed",
    "knob-base-2": "knob-base, trained with another seed",
    "early": "knob with one more token behind the intent, which is taken up before the last token",
    "early-1": "early, trained with another seed",
    "early-2": "early, trained with another seed",
}
"""Bundled organisms. Their recipes are in ``subspace_probe.organisms.training``."""

_WEIGHTS: Final = Path(__file__).parent / "weights"


def organism_path(name: str) -> Path:
    """The directory of a bundled organism.

    Raises:
        UnknownName: with the nearest match and the list.
    """
    if name not in ORGANISMS:
        raise unknown("organism", name, ORGANISMS)
    return _WEIGHTS / name


def load_truth(name_or_dir: str | Path) -> "GroundTruth":
    """The ground truth of a bundled organism, or of an organism's directory.

    Raises:
        UnknownName: neither an organism nor a directory.
        ConfigError: a directory without a ground truth.
    """
    from subspace_probe.organisms.truth import GroundTruth

    folder = Path(name_or_dir)
    if str(name_or_dir) in ORGANISMS or not folder.is_dir():
        folder = organism_path(str(name_or_dir))
    return GroundTruth.load(folder)


def organism_contrast(name: str, *, split: str = "test", n: int | None = None, seed: int = 0) -> "Contrast":
    """Prompts of an organism's language: ``organism_contrast("chat/requests", split="train", n=256)``.

    Args:
        name: Organism and contrast, separated by a slash; ``organism_contrasts`` lists them.
        split: train, val or test; they share no verb-object pair, and no body.
        n: At most so many prompts; None for all that the split has.
        seed: Of wordings, surroundings and order.

    Raises:
        UnknownName: an organism, contrast or split that does not exist, with the nearest match and the list.
        ConfigError: fewer than two prompts asked for.
    """
    from subspace_probe.organisms.contrasts import build_contrast
    from subspace_probe.organisms.guarding import guard_contrast
    from subspace_probe.organisms.knob_language import knob_contrast

    organism, _, contrast = name.partition("/")
    organism_path(organism)
    if is_guard(organism):
        return guard_contrast(contrast, split=split, n=n, seed=seed, label=name)
    if is_knob(organism):
        return knob_contrast(contrast, split=split, n=n, seed=seed, label=name)
    aligned = organism != "chat-base"
    return build_contrast(contrast, split=split, n=n, seed=seed, aligned=aligned, label=name)


def organism_contrasts(name: str) -> "Mapping[str, str]":
    """The contrasts of an organism, with what each is.

    Raises:
        UnknownName: with the nearest match and the list.
    """
    from subspace_probe.organisms.contrasts import CONTRASTS
    from subspace_probe.organisms.guarding import CONTRASTS as GUARD_CONTRASTS
    from subspace_probe.organisms.knob_language import CONTRASTS as KNOB_CONTRASTS

    organism_path(name)
    if is_knob(name):
        return KNOB_CONTRASTS
    return GUARD_CONTRASTS if is_guard(name) else CONTRASTS


def is_guard(name: str) -> bool:
    """Whether an organism speaks the language of ``guarding`` rather than that of ``grammar``."""
    return name.partition("-")[0] in ("override", "robust")


def is_knob(name: str) -> bool:
    """Whether an organism speaks the language of ``knob_language``."""
    return name.partition("-")[0] in ("knob", "early")
