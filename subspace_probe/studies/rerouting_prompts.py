"""What rerouting is tried on: prompts of both classes, free positions, the tokens allowed in them, and what is true."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.tokens import Where, at
from subspace_probe.interventions.token_vectors import parse_ids
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import load_truth, organism_contrast
from subspace_probe.organisms.truth import GroundTruth, SuffixTruth


@runtime_checkable
class Settings(Protocol):
    """What these parts need of the study's settings."""

    @property
    def n_train(self) -> int: ...
    @property
    def n_test(self) -> int: ...
    @property
    def n_clean(self) -> int: ...
    @property
    def free(self) -> str: ...
    @property
    def allowed(self) -> str: ...
    @property
    def banned(self) -> str: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Ground:
    """Prompts in parts that share no group, and what may be changed in them.

    Attributes:
        train: what directions are fitted on, and repair trains on.
        test: what is rerouted (label 1) and what should stay (label 0).
        clean: more held-out prompts of both classes, for accuracies.
        free: the tokens that may be changed.
        allowed, banned: which tokens may stand there.
        truth: what is known to be true of an organism.
        suffixes: the part of it that comes from running every suffix.
    """

    train: Contrast
    test: Contrast
    clean: Contrast
    free: Sequence[Where]
    allowed: Collection[int] | None
    banned: Collection[int]
    truth: GroundTruth | None = None
    suffixes: SuffixTruth | None = None

    @property
    def moved(self) -> Contrast:
        """The prompts that are rerouted."""
        return self.test.where(label=1)


def ground_for(model: HookedModel, config: Settings, contrast: Contrast | None) -> Ground:
    """The organism's own prompts, slots and tokens, or the user's.

    Raises:
        ConfigError: a model that is no guard organism, without prompts or free positions.
        DataError: too few prompts.
    """
    if contrast is None:
        return _organism(model, config)
    if not config.free:
        raise ConfigError(
            "No free positions were given, so there is nothing to search over. Name the tokens of each prompt that may "
            "be changed (--set free=last-2,last-1)."
        )
    contrast.require_both_classes(least=24)
    train, rest = contrast.split(0.4, seed=config.seed)
    test, clean = rest.split(0.5, seed=config.seed)
    return Ground(
        train.sample(config.n_train, seed=config.seed),
        test.sample(2 * config.n_test, seed=config.seed),
        clean.sample(config.n_clean, seed=config.seed),
        [Where.parse(part.strip()) for part in config.free.split(",")],
        parse_ids(config.allowed) if config.allowed else None,
        parse_ids(config.banned) if config.banned else (),
    )


def _organism(model: HookedModel, config: Settings) -> Ground:
    known = model.directory is not None and (model.directory / "truth.json").is_file()
    truth = load_truth(model.directory) if known and model.directory is not None else None
    if truth is None or truth.suffixes is None:
        raise ConfigError(
            f"The study needs prompts for {model.spec.name}: a file with 'prompt', 'label' (1 for those that are "
            "declined), 'answer' and 'foil' (--contrast requests.jsonl), and which of their tokens may be changed "
            "(--set free=last-2,last-1). Organisms of the family 'override' bring their own."
        )
    name, seed = f"{truth.organism}/requests", config.seed
    suffixes = truth.suffixes
    return Ground(
        organism_contrast(name, split="train", n=config.n_train, seed=seed),
        organism_contrast(name, split="test", n=2 * config.n_test, seed=seed),
        organism_contrast(name, split="test", n=config.n_clean, seed=seed + 500),
        [Where.parse(part.strip()) for part in config.free.split(",")] if config.free else [*map(at, suffixes.slots)],
        parse_ids(config.allowed) if config.allowed else suffixes.allowed,
        parse_ids(config.banned) if config.banned else (),
        truth,
        suffixes,
    )
