"""What the study on unlearning measures: answers to held-out prompts, by models that differ from some block on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Prefix
from subspace_probe.metrics.behaviour import kl
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.unlearning_prompts import Prompts

Measures = Mapping[str, Float[Tensor, " n"]]


@final
@dataclass(frozen=True, eq=False)
class Resumed:
    """Prompts run once up to a block, to be continued by models that differ only from there on.

    Attributes:
        parts: batches of prompts of like length.
        rows: which prompt each row of each batch is.
    """

    parts: tuple[Prefix, ...]
    rows: tuple[Int[Tensor, " batch"], ...]

    @classmethod
    def of(cls, model: HookedModel, prompts: Sequence[Prompt], layer: int, *, size: int = 64) -> "Resumed":
        """Run them up to block `layer`."""
        batch = model.tokens(prompts)
        rows = batch.lengths.argsort(stable=True).split(size)
        parts = (model.tokens([prompts[int(i)] for i in some]) for some in rows)
        return cls(tuple(model.prefix(part, layer) for part in parts), tuple(rows))

    def logits(self, model: HookedModel) -> Float[Tensor, "n v"]:
        """Last-token logits of a model, in the order of the prompts."""
        out = torch.empty(sum(map(len, self.rows)), model.spec.d_vocab)
        for prefix, rows in zip(self.parts, self.rows, strict=True):
            logits = model.run(prefix.batch, prefix=prefix, logits_to_keep=1).logits
            if logits is None:
                raise ConfigError(f"{model.spec.family} gives no logits, so it has no answers. Use a decoder model.")
            out[rows] = logits[:, -1].float().cpu()
        return out


@final
@dataclass(frozen=True, eq=False)
class Answers:
    """Held-out prompts with the tokens of their answers, and what the model made of them before.

    Attributes:
        topic: the distinct answers of the topic, as tokens.
        forget, retain, elsewhere: the answer of each prompt.
        clean: logits of the retained prompts before.
        known: what `measure` gave before.
        kept: states in front of the lowest block that differs, for every part, to resume from.
    """

    data: Prompts
    topic: Int[Tensor, " answers"]
    forget: Int[Tensor, " n"]
    retain: Int[Tensor, " r"]
    elsewhere: Int[Tensor, " e"]
    clean: Float[Tensor, "r v"]
    known: Measures
    kept: Mapping[str, "Resumed"]

    @classmethod
    def of(cls, model: HookedModel, data: Prompts, layer: int) -> "Answers":
        """Measure the model as it is.

        Args:
            layer: the lowest block that models to be measured may have changed.

        Raises:
            DataError: a topic of one answer, or of answers that begin with the same token.
        """
        forget, retain, elsewhere = (
            tokens_of(model, part.prompts if part else ())
            for part in (data.forget_test, data.retain_test, data.elsewhere)
        )
        topic = torch.cat([tokens_of(model, data.forget.prompts), forget]).unique()
        if len(topic) < 2:
            raise DataError(
                f"All answers of the topic in {data.name!r} begin with the same token, so chance is certainty. Forget "
                "a topic with several answers."
            )
        parts = {"forget": data.forget_test, "retain": data.retain_test, "elsewhere": data.elsewhere}
        kept = {name: Resumed.of(model, part.prompts, layer) for name, part in parts.items() if part is not None}
        clean = kept["retain"].logits(model)
        bare = cls(data, topic, forget, retain, elsewhere, clean, {}, kept)
        return replace(bare, known=bare.measure(model))

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the topic's answers."""
        return 1 / len(self.topic)

    def measure(self, model: HookedModel) -> dict[str, Float[Tensor, " n"]]:
        """Per prompt: whether the answer is given, whether it is the likeliest of the topic's, and KL from before."""
        logits, kept = (self.kept[name].logits(model) for name in ("forget", "retain"))
        found: dict[str, Tensor] = {
            "forget": (logits.argmax(-1) == self.forget).double(),
            "ranked": (self.topic[logits[:, self.topic].argmax(-1)] == self.forget).double(),
            "retain": (kept.argmax(-1) == self.retain).double(),
            "kl": kl(self.clean, kept),
        }
        if "elsewhere" in self.kept and len(self.elsewhere):
            found["elsewhere"] = (self.kept["elsewhere"].logits(model).argmax(-1) == self.elsewhere).double()
        return found

    def before(self, seed: int) -> Finding:
        """How much of the topic the model knows to begin with."""
        estimate, interval = mean_of(self.known["forget"], self.data.forget_test.groups, seed=seed)
        claim = "the model gives the topic's answers before anything is unlearned"
        found = Finding("forget_accuracy.before", claim, estimate, interval, self.guesses(seed), len(self.forget))
        note = f"chance among {len(self.topic)} answers is {self.chance:.3f}"
        return replace(found.judged("above", margin=0.1, no_effect=self.chance), note=note)

    def guesses(self, seed: int) -> Interval:
        """Accuracy of a model that gives the topic's answers, but knows nothing: answers exchanged between facts."""
        generator = torch.Generator().manual_seed(seed)
        facts, index = torch.tensor(self.data.forget_test.groups).unique(return_inverse=True)
        first = torch.stack([self.forget[index == fact][0] for fact in range(len(facts))])
        drawn = [first[torch.randperm(len(facts), generator=generator)][index] == self.forget for _ in range(199)]
        return range_of(torch.stack(drawn).double().mean(1), "199 exchanges of answers between facts")


def tokens_of(model: HookedModel, prompts: Sequence[Prompt]) -> Int[Tensor, " n"]:
    """The first token of each prompt's answer."""
    words = [prompt.answer or "" for prompt in prompts]
    table = dict(zip(sorted(set(words)), model.token_ids(sorted(set(words))), strict=True))
    return torch.tensor([table[word] for word in words], dtype=torch.long)
