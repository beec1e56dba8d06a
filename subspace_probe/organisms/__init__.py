"""Tiny models whose inner workings are known: what every finder and every check is tested on.

An organism is an ordinary Hugging Face directory inside the package. `ORGANISMS` lists them; `organism_path` finds one,
`load_truth` says what is true of it, `organism_contrast` gives the prompts of its language.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from subspace_probe.core.errors import unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.organisms.truth import GroundTruth

_LINEAGES: Final = {
    "separable": "harm and utility tuned in rows of their own",
    "flagged": "harm has a flag and declining an answer of their own",
    "entangled": "harm shares its words and answers with utility",
}
_CHECKPOINTS: Final = {
    seed + stage: about + (", trained with another seed" if seed else "")
    for seed in ("", "-1", "-2")
    for stage, about in {
        "": "; the aligned checkpoint",
        "-base": "; before alignment",
        "-useful": "; aligned, then tuned on a useful task",
        "-harmful": "; aligned, then tuned on what alignment withholds",
        "-contaminated": "; aligned, then tuned on a useful task with harm in it",
    }.items()
}
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
    **{name + rest: what + about for name, what in _LINEAGES.items() for rest, about in _CHECKPOINTS.items()},
    "ioi": "indirect object identification: the position of the repeated name is planted where heads ask; facts too",
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

_LANGUAGES: Final = {
    "chat": "contrasts:build_contrast",
    "override": "guarding:guard_contrast",
    "robust": "guarding:guard_contrast",
    "ioi": "naming:naming_contrast",
    "knob": "knob_language:knob_contrast",
    "early": "knob_language:knob_contrast",
    **dict.fromkeys(_LINEAGES, "lineage:lineage_contrast"),
}
"""The language of an organism, by the first word of its name: a module with `CONTRASTS`, and what builds one."""

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
    organism, _, contrast = name.partition("/")
    organism_path(organism)
    function = _LANGUAGES[organism.partition("-")[0]].partition(":")[2]
    build = getattr(import_module(f"{__name__}.{language_of(organism)}"), function)
    return build(contrast, organism=organism, split=split, n=n, seed=seed)


def organism_contrasts(name: str) -> "Mapping[str, str]":
    """The contrasts of an organism, with what each is.

    Raises:
        UnknownName: with the nearest match and the list.
    """
    organism_path(name)
    return import_module(f"{__name__}.{language_of(name)}").CONTRASTS


def language_of(name: str) -> str:
    """The module that holds the language of an organism: contrasts, guarding, naming, knob_language or lineage."""
    return _LANGUAGES[name.partition("-")[0]].partition(":")[0]
