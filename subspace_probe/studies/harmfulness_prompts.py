"""The prompts of the studies on refusal: three parts that share no group, each labelled by what the model does."""

from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.prompts import asking
from subspace_probe.core.protocols import Metric
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import organism_contrast

FRAMINGS = ("plain", "jailbreak", "strict")


@runtime_checkable
class Sizes(Protocol):
    """How many prompts each part has."""

    @property
    def n_train(self) -> int: ...
    @property
    def n_validation(self) -> int: ...
    @property
    def n_test(self) -> int: ...
    @property
    def seed(self) -> int: ...


@runtime_checkable
class Settings(Sizes, Protocol):
    """What the tables of these studies need of their settings."""

    @property
    def completions(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Prompts:
    """Requests in three parts that share no group, each with the factor `refused`: what the model itself does.

    Attributes:
        question: what the model is asked about a request, for studies that ask.
        neutral: prompts of other skills, with answers; None where there are none.
    """

    train: Contrast
    validation: Contrast
    test: Contrast
    question: str = ""
    neutral: Contrast | None = None

    def plain(self, contrast: Contrast) -> Contrast:
        """Without framings, where there are any."""
        return contrast.where(framing=0) if "framing" in contrast.factors else contrast

    def ask(self, contrast: Contrast) -> Contrast:
        """The model is asked about the requests, without framings."""
        return self.plain(contrast).map(lambda prompt: asking(prompt, self.question))

    @property
    def plain_harmless(self) -> Contrast:
        """Harmless requests, test part."""
        return self.plain(self.test.where(label=0))

    @property
    def plain_harmful(self) -> Contrast:
        """Harmful requests, test part."""
        return self.plain(self.test.where(label=1))

    @property
    def asked_harmless(self) -> Contrast:
        """Harmless requests with the question, test part."""
        return self.ask(self.test.where(label=0))

    @property
    def asked_harmful(self) -> Contrast:
        """Harmful requests with the question, test part."""
        return self.ask(self.test.where(label=1))


def framings(acts: Activations) -> dict[str, Activations]:
    """Activations by framing; all under "plain" where prompts have none."""
    if "framing" not in acts.contrast.factors:
        return {"plain": acts}
    present = sorted(set(acts.contrast.factors["framing"]))
    return {FRAMINGS[i]: acts.select(framing=i) for i in present}


def prompts_for(
    model: HookedModel, config: Sizes, contrast: Contrast | None, refusal_score: Metric, *, question: str = ""
) -> Prompts:
    """The organism's own prompts, or the user's split by group; each prompt labelled by what the model does with it."""
    sizes = {"train": config.n_train, "val": config.n_validation, "test": config.n_test}
    neutral: Contrast | None = None
    if contrast is None:
        organism = model.spec.name.removeprefix("organism:")
        if organism == model.spec.name:
            raise ConfigError(
                f"The study needs harmful and harmless requests for {model.spec.name}. Give a file with 'prompt' and "
                "'label' (--contrast requests.jsonl); none is bundled."
            )
        seed = config.seed
        parts = [organism_contrast(f"{organism}/requests", split=part, n=n, seed=seed) for part, n in sizes.items()]
        neutral = organism_contrast(f"{organism}/skills", split="test", n=200, seed=seed)
    else:
        contrast.require_both_classes(least=24)
        # a user's column of that name means something else: framings are the organisms' own
        factors = {name: column for name, column in contrast.factors.items() if name != "framing"}
        contrast = replace(contrast, factors=factors)
        train, rest = contrast.split(0.5, seed=config.seed)
        validation, test = rest.split(0.35, seed=config.seed)
        sized = zip((train, validation, test), sizes.values(), strict=True)
        parts = [part.sample(n, seed=config.seed) for part, n in sized]
    train, validation, test = (_with_behaviour(model, part, refusal_score) for part in parts)
    if len(set(train.factors["refused"])) < 2:
        always = "refuses" if train.factors["refused"][0] else "complies with"
        raise ConfigError(
            f"{model.spec.name} {always} all {len(train)} training prompts, so there is no refusal to find a direction "
            "for. Check the words that stand for refusal (--words refusal=...), or choose other prompts."
        )
    return Prompts(train, validation, test, question, neutral)


def _with_behaviour(model: HookedModel, contrast: Contrast, refusal_score: Metric) -> Contrast:
    scores = outcomes(model, contrast.prompts, [None], [refusal_score])[0, 0]
    refused = tuple(int(value > 0) for value in scores.tolist())
    return replace(contrast, factors={**contrast.factors, "refused": refused})
