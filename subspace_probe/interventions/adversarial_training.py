"""Repair: train a copy of a model to answer as it did, whatever stands in the free positions.

The defence that follows a search: tokens it found are put into prompts of both classes, and the answer of each prompt
stays what it was without them. After Madry et al. 2018, https://arxiv.org/abs/1706.06083, with found tokens in place of
perturbed inputs. That the found tokens no longer work shows little by itself: search the repaired model again.
"""

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.interventions.objectives import free_positions, replaced
from subspace_probe.interventions.token_vectors import usable_ids
from subspace_probe.models.hooked import HookedModel


@final
@dataclass(frozen=True)
class AdversarialTraining:
    """Fine-tuning on found tokens, random tokens and clean prompts, a third of every batch each.

    Random tokens are there so that the free positions come to mean nothing, rather than the found tokens alone. All
    weights are trained by the cross-entropy of the answer's first token, with AdamW and a learning rate that falls to
    zero.

    Args:
        steps: of training.
        batch: prompts a step.
        learning_rate: at the beginning. The default is for organisms, where training without the found tokens
            leaves what they do (at 1e-3 any training undoes it); take about 1e-5 for a model of a billion weights.
        seed: of every draw.
    """

    steps: int = 200
    batch: int = 96
    learning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 3 or not self.learning_rate > 0:
            raise ConfigError(
                f"Training was given steps={self.steps}, batch={self.batch}, learning_rate={self.learning_rate}. It "
                "takes a step, three prompts a batch and a positive rate at least."
            )

    def repair(
        self,
        model: HookedModel,
        prompts: Contrast,
        free: Sequence[Where],
        found: Int[Tensor, "m slot"],
        *,
        allowed: Collection[int] | None = None,
        banned: Collection[int] = (),
        progress: bool = False,
    ) -> HookedModel:
        """A trained copy; the model given is left as it is.

        Args:
            prompts: of both classes, each with its `answer`; none that anything is measured on afterwards.
            free: the tokens that were searched over.
            found: what was found for them.
            allowed, banned: which tokens random rows are drawn from.

        Raises:
            ConfigError: nothing was found, prompts without an answer, or standing interventions.
        """
        answers = [prompt.answer for prompt in prompts.prompts if prompt.answer]
        if not len(found) or len(answers) < len(prompts):
            raise ConfigError(
                f"Repair was given {len(found)} rows of found tokens and {len(prompts)} prompts, {len(answers)} of "
                "them with an answer. It takes at least one row, and an answer for every prompt (column 'answer')."
            )
        if model.standing_sites:
            raise ConfigError("The model has standing interventions, which training would not see. Give it without.")
        batch = model.tokens(prompts)
        drawing = _Drawing(
            batch,
            free_positions(batch, free),
            torch.tensor(model.token_ids(answers)),
            found,
            usable_ids(model, allowed=allowed, banned=banned),
            torch.Generator().manual_seed(self.seed),
        )
        backend = model.backend
        copy = type(backend)(deepcopy(backend.hf), name=f"{model.spec.name}, repaired")
        trained = HookedModel(copy, model.tokenizer, template_kwargs=model.template_kwargs, words=model.words)
        self._fit(trained, drawing, progress)
        return trained

    def _fit(self, model: HookedModel, drawing: "_Drawing", progress: bool) -> None:
        hf = model.backend.hf
        weights = [weight.requires_grad_() for weight in hf.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        with torch.enable_grad():
            for _ in tqdm(range(self.steps), disable=not progress, desc="repair", leave=False):
                batch, answers = drawing.draw(self.batch)
                logits = model.run(batch, grad=True, logits_to_keep=1).logits
                if logits is None:
                    raise ConfigError("The model gives no logits, so no answer can be trained. Load a decoder.")
                torch.nn.functional.cross_entropy(logits[:, -1].float(), answers.to(logits.device)).backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
        for weight in weights:
            weight.requires_grad_(False)


@final
@dataclass(frozen=True, eq=False)
class _Drawing:
    """Batches of prompts: as they came, with random tokens, with found ones."""

    batch: TokenBatch
    positions: Int[Tensor, "n slot"]
    answers: Int[Tensor, " n"]
    found: Int[Tensor, "m slot"]
    usable: Int[Tensor, " v"]
    generator: torch.Generator

    def draw(self, size: int) -> tuple[TokenBatch, Int[Tensor, " size"]]:
        """Prompts and the ids of their answers."""
        rows = self._below(self.batch.size, size)
        batch, positions = self.batch.rows(rows.tolist()), self.positions[rows]
        third = size // 3
        given = batch.ids.gather(1, positions - batch.lengths[:, None] + batch.ids.shape[1])
        random = self.usable[self._below(len(self.usable), third * given.shape[1])].reshape(third, -1)
        found = self.found[self._below(len(self.found), third)]
        ids = torch.cat([given[: size - 2 * third], random.to(given), found.to(given)])
        return replaced(batch, positions, ids), self.answers[rows]

    def _below(self, high: int, n: int) -> Int[Tensor, " n"]:
        return torch.randint(high, (n,), generator=self.generator)
