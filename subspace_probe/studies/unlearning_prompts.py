"""The prompts of the study on unlearning: a topic to forget, and what is to be kept."""

from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.prompts import Message, Prompt
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import organism_contrast, wordings, words

TRAINED_WORDINGS, TESTED_WORDING = (0, 1), 2
OTHERS = {"skills": 3, "requests": 1, "judgement": 1}
"""What else the organism can do and should go on doing, and how many prompts of it: the first are of many skills."""


@runtime_checkable
class Settings(Protocol):
    """What these parts need of the study's settings."""

    @property
    def n_retain(self) -> int: ...
    @property
    def n_test(self) -> int: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts with answers; groups are facts.

    Attributes:
        name: where they come from.
        forget, forget_test: the topic to forget.
        forget_val, retain_val: what the layer is chosen on.
        retain, retain_test: what is to be kept. In the test part label 1 marks the topic's nearest relative, where one
            is known.
        elsewhere: the forgotten facts asked for in another way, where there are such prompts.
    """

    name: str
    forget: Contrast
    forget_test: Contrast
    retain: Contrast
    retain_test: Contrast
    forget_val: Contrast
    retain_val: Contrast
    elsewhere: Contrast | None = None

    @property
    def both(self) -> Contrast:
        """The training parts as one contrast: label 1 is what is to be forgotten."""
        return joined("forget and retain", replaced(self.forget, 1), replaced(self.retain, 0))


def prompts_for(model: HookedModel, config: Settings, contrast: Contrast | None) -> Prompts:
    """The organism's own prompts, or the user's in two halves that share no group.

    Raises:
        ConfigError: no prompts for a model that brings none.
        DataError: prompts without answers, or too few.
    """
    if contrast is not None:
        return _given(contrast, config)
    organism = model.spec.name.removeprefix("organism:")
    if organism == model.spec.name:
        raise ConfigError(
            f"The study needs a topic to forget for {model.spec.name}. Give a file with 'prompt', 'answer' and "
            "'label', 1 for what is to be forgotten and 0 for what is to be kept (--contrast topic.jsonl). Prompts "
            "that ask for the same fact share a number in the column 'group'."
        )
    return _of_organism(organism, config)


def _given(contrast: Contrast, config: Settings) -> Prompts:
    contrast.require_both_classes(least=16)
    if missing := [row for row, prompt in enumerate(contrast.prompts) if not prompt.answer]:
        raise DataError(
            f"{len(missing)} of {len(contrast)} prompts of {contrast.name!r} have no answer, so nothing can be said to "
            "be forgotten. Add a column 'answer'."
        )
    train, test = contrast.split(0.5, seed=config.seed)
    train, validation = train.split(0.75, seed=config.seed)
    retain, retain_test = train.where(label=0), replaced(test.where(label=0), 0)
    return Prompts(
        contrast.name,
        train.where(label=1),
        test.where(label=1).sample(config.n_test, seed=config.seed),
        retain.sample(config.n_retain, seed=config.seed),
        retain_test.sample(config.n_test, seed=config.seed),
        validation.where(label=1),
        replaced(validation.where(label=0), 0).sample(config.n_test, seed=config.seed),
    )


def _of_organism(organism: str, config: Settings) -> Prompts:
    """Capitals are forgotten; dishes of the same countries and all other skills are kept.

    Topics, not countries: a country's two facts share every word but the question's, so that what is to be forgotten
    cannot be told by the country alone, and what is nearest to it is kept. Prompts of other skills that ask for a
    capital are on neither side; those that ask for it from memory show whether it is forgotten elsewhere too.
    """
    capitals, dishes = ((wordings.CAPITAL_QUESTIONS, words.CAPITAL_OF), (wordings.DISH_QUESTIONS, words.DISH_OF))
    seed = config.seed
    train, validation, test = (
        joined(
            part,
            *(
                _without_capitals(organism_contrast(f"{organism}/{name}", split=part, n=times * n, seed=seed))
                for name, times in OTHERS.items()
            ),
        )
        for part, n in (("train", config.n_retain), ("val", config.n_test // 2), ("test", config.n_test))
    )
    near = _facts("dishes", *dishes, (TESTED_WORDING,), ("", wordings.SYSTEMS[0]), label=1)
    knob = organism_contrast(f"{organism}/knob", split="test", n=2 * config.n_test, seed=seed).where(label=0)
    return Prompts(
        f"{organism}: capitals against dishes and other skills",
        _facts("capitals", *capitals, TRAINED_WORDINGS, ("",), label=1),
        _facts("capitals", *capitals, (TESTED_WORDING,), ("", wordings.SYSTEMS[0]), label=1),
        joined("kept", _facts("dishes", *dishes, TRAINED_WORDINGS, ("",), label=0), replaced(train, 0)),
        joined("kept", near, replaced(test, 0)),
        _facts("capitals", *capitals, TRAINED_WORDINGS[:1], wordings.SYSTEMS[1:2], label=1),
        joined("kept", _facts("dishes", *dishes, TRAINED_WORDINGS[:1], wordings.SYSTEMS[1:2], label=0), validation),
        knob.take([row for row, prompt in enumerate(knob.prompts) if prompt.answer in words.CAPITALS]),
    )


def _facts(
    name: str,
    questions: tuple[str, ...],
    answers: dict[str, str],
    chosen: tuple[int, ...],
    systems: tuple[str, ...],
    *,
    label: int,
) -> Contrast:
    prompts: list[Prompt] = []
    groups: list[int] = []
    for group, (country, answer) in enumerate(answers.items()):
        for question in chosen:
            for system in systems:
                first = (Message(role="system", content=system),) if system else ()
                asked = Message(role="user", content=questions[question].format(c=country))
                prompts.append(Prompt(messages=(*first, asked), answer=answer))
                groups.append(group)
    return Contrast(name, tuple(prompts), (label,) * len(prompts), tuple(groups), tuple(groups))


def _asks_for_a_capital(prompt: Prompt) -> bool:
    questions = [question.partition("{c}")[0] for question in wordings.CAPITAL_QUESTIONS]
    return any(question in message["content"] for message in prompt.messages for question in questions)


def _without_capitals(contrast: Contrast) -> Contrast:
    return contrast.take([row for row, prompt in enumerate(contrast.prompts) if not _asks_for_a_capital(prompt)])


def replaced(contrast: Contrast, label: int) -> Contrast:
    """The same prompts, all with one label."""
    return replace(contrast, labels=(label,) * len(contrast), factors={})


def joined(name: str, *parts: Contrast) -> Contrast:
    """Several contrasts as one, their groups kept apart."""
    groups: list[int] = []
    for part in parts:
        start = max(groups, default=-1) + 1
        names = {group: start + number for number, group in enumerate(dict.fromkeys(part.groups))}
        groups += [names[group] for group in part.groups]
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    labels = tuple(label for part in parts for label in part.labels)
    return Contrast(name, prompts, labels, tuple(groups), tuple(groups))
