"""Scores while generating, read in the very passes that make the text, and what happens when they trip.

The score of a generated token is read in the pass that takes it in, so it costs one product a token, and what is
produced by that pass is not shown once the guard has tripped. The threshold is set on the running maximum over whole
answers: one that is set on single tokens is passed by more and more answers the longer they grow.

A guard is fitted at one token of prompts. What generated tokens hold is fitted on answers: `fit_stream`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray

from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Step
from subspace_probe.core.tokens import TokenBatch
from subspace_probe.guard.classifier import GuardClassifier, Labels
from subspace_probe.guard.examples import Groups, Shown, examples_of
from subspace_probe.guard.judgements import Judgement
from subspace_probe.guard.probe import LatentProbe
from subspace_probe.guard.stream_rule import Running, Streaming

Action = Literal["answered", "stopped", "replaced", "routed"]


@final
@dataclass(frozen=True)
class Guarded:
    """An answer that was watched while it was made.

    Attributes:
        text: what may be shown: the answer, its beginning, or what stands for it.
        scores: of the generated tokens that were taken in by a pass.
        prompt: what the guard says of the prompt, read in the first pass.
        tripped: the generated token at which it tripped, counted from 0; -1: at the prompt; None: it did not.
        action: what was done.
    """

    text: str
    scores: tuple[float, ...]
    prompt: Judgement
    tripped: int | None
    action: Action


def fit_stream(
    guard: GuardClassifier,
    X: Shown,
    y: Labels | None = None,
    *,
    streaming: Streaming | None = None,
    progress: bool = False,
) -> Streaming:
    """Fit a probe on the tokens of the model's own answers, each labelled as its prompt; the guard keeps it.

    Args:
        X: prompts of both classes; what the guard was fitted on will do.
        streaming: the other settings.

    Raises:
        DataError: prompts of one class or that the guard is calibrated or has its threshold on, or answers without a
            token that a pass took in.
    """
    streaming, examples = streaming or Streaming(), examples_of(X, y)
    guard.require_fresh(examples, "fit_stream", ("calibrate", "threshold"))
    watched = _Watched(guard, replace(streaming, probe=None, threshold=None), examples.prompts, at_prompt=False)
    watched.run(progress=progress)
    counts = [len(rows) for rows in watched.states]
    labels = np.repeat(examples.labels, counts)
    if len(set(labels.tolist())) < 2:
        raise DataError(
            f"The answers to {len(counts)} prompts have {sum(counts)} tokens to fit on, not of both classes. Allow "
            "more tokens (max_new_tokens), or give more prompts."
        )
    rows = np.array([state for states in watched.states for state in states])
    probe = LatentProbe(**guard.probe.get_params()).fit(rows, labels)
    guard.streaming = replace(streaming, probe=probe, threshold=None)
    guard.use("fit", examples)
    return guard.streaming


def stream_threshold(
    guard: GuardClassifier,
    negatives: Shown,
    *,
    streaming: Streaming | None = None,
    target_fpr: float = 0.01,
    confidence: float | None = 0.95,
    groups: Groups | None = None,
    progress: bool = False,
) -> Streaming:
    """Set the threshold on the running maxima over answers to negatives; the guard keeps it, and returns it.

    The prompts themselves have a threshold of their own (`LatentGuard.set_threshold`); both may trip, so the share of
    negatives that is stopped is at most the sum of the two.

    Raises:
        DataError: as `LatentGuard.set_threshold`; or answers too short to be scored.
    """

    streaming = streaming or guard.streaming or Streaming()

    def highest(shown: Shown) -> NDArray[np.float64]:
        watched = _Watched(guard, replace(streaming, threshold=None), examples_of(shown).prompts, at_prompt=False)
        watched.run(progress=progress)
        last = np.array([running.highest for running in watched.running])
        finite = last[np.isfinite(last)]
        if not len(finite):
            raise DataError(
                f"None of the {len(last)} answers has a token that could trip (min_tokens={streaming.min_tokens}). "
                "Allow more tokens, or lower min_tokens."
            )
        # an answer that ends before any score never trips
        return np.where(np.isfinite(last), last, finite.min() - 1.0)

    made = guard.threshold_on(negatives, highest, target_fpr=target_fpr, confidence=confidence, groups=groups)
    guard.streaming = replace(streaming, threshold=made, set_for=streaming.rule)
    return guard.streaming


def watch(
    guard: GuardClassifier,
    shown: Shown,
    *,
    streaming: Streaming | None = None,
    replacement: str | None = None,
    route: Callable[[Prompt], str] | None = None,
    on_token: Callable[[int, str, float], None] | None = None,
    progress: bool = False,
) -> list[Guarded]:
    """Greedy answers, scored while they are made, and stopped where the guard trips.

    A prompt that is flagged gets no answer at all where the guard has a threshold for prompts.

    Args:
        guard: fitted.
        shown: prompts.
        streaming: how scores become a decision; the guard's own by default.
        replacement: the text in place of an answer that tripped; without it the answer ends with the token that
            made it trip, which was shown before it could be read.
        route: makes the text in place of one that tripped, from the prompt: a larger model, a person.
        on_token: called with the prompt's number, the text of each token and its score, as they come.

    Raises:
        ConfigError: no threshold, or both a replacement and a route.
    """
    streaming = streaming or guard.streaming
    if streaming is None or streaming.threshold is None:
        raise ConfigError("There is no threshold for streaming. Set one on negatives: stream_threshold(guard, ...).")
    streaming.require_rule()
    if replacement is not None and route is not None:
        raise ConfigError("Both a replacement and a route were given for answers that trip. Give one of them.")
    prompts = examples_of(shown).prompts
    watched = _Watched(guard, streaming, prompts, at_prompt=guard.threshold is not None, on_token=on_token)
    watched.run(progress=progress)
    found: list[Guarded] = []
    for row, prompt in enumerate(prompts):
        text, action = watched.text(row), "answered"
        if watched.tripped[row] is not None:
            action = "stopped" if replacement is None and route is None else "replaced" if route is None else "routed"
            text = route(prompt) if route is not None else text if replacement is None else replacement
        judged = watched.judged[row]
        found.append(Guarded(text, tuple(watched.scores[row]), judged, watched.tripped[row], action))
    return found


@final
class _Watched:
    """What is known of every row while it is generated."""

    def __init__(
        self,
        guard: GuardClassifier,
        streaming: Streaming,
        prompts: tuple[Prompt, ...],
        *,
        at_prompt: bool,
        on_token: Callable[[int, str, float], None] | None = None,
    ) -> None:
        self.guard, self.streaming, self.prompts = guard, streaming, prompts
        self.at_prompt, self.on_token = at_prompt, on_token
        self.probe = streaming.probe or guard.probe
        self.states: list[list[NDArray[np.float64]]] = [[] for _ in prompts]
        self.scores: list[list[float]] = [[] for _ in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.tripped: list[int | None] = [None] * len(prompts)
        self.judged: list[Judgement] = []
        self.running = [Running(streaming) for _ in prompts]
        self._batch = guard.model.tokens(prompts)
        self._known: dict[int, Judgement] = {}

    def run(self, *, progress: bool) -> None:
        """Generate, all prompts."""
        self.guard.model.generate(
            self.prompts,
            reads=self.guard.sites,
            on_step=self._step,
            max_new_tokens=self.streaming.max_new_tokens,
            batch_tokens=self.guard.batch_tokens,
            progress=progress,
        )
        self.judged = [self._known[row] for row in range(len(self.prompts))]

    def text(self, row: int) -> str:
        """What was generated up to the token that tripped, or all of it."""
        tripped = self.tripped[row]
        kept = self.tokens[row] if tripped is None else self.tokens[row][: tripped + 1]
        return self.guard.model.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def _step(self, rows: Sequence[int], step: Step) -> list[bool]:
        """Score what this pass took in, and say which rows go on."""
        if step.index == 0:
            self._prompts(rows, step)
        else:
            states = torch.cat([step.reads[site][:, -1] for site in self.guard.sites], dim=1)
            taken_in = states.double().cpu().numpy()
            for row, state, score in zip(rows, taken_in, self.probe.decision_function(taken_in), strict=True):
                self._token(row, step.index - 1, state, float(score))
        for row, token in zip(rows, step.tokens.tolist(), strict=True):
            if self.tripped[row] is None and not self._over(row):
                self.tokens[row].append(token)
        return [self.tripped[row] is None for row in rows]

    def _prompts(self, rows: Sequence[int], step: Step) -> None:
        for row, judged in zip(rows, self._read(self._batch.rows(list(rows)), step), strict=True):
            self._known[row] = judged
            if self.at_prompt and judged.flagged:
                self.tripped[row] = -1

    def _read(self, batch: TokenBatch, step: Step) -> list[Judgement]:
        """The guard's judgement of prompts from the first pass, which saw all their tokens."""
        chosen = batch.select(self.guard.where, batch.positions) & batch.mask
        counts = chosen.sum(-1, keepdim=True).double()
        blocks = []
        for site in self.guard.sites:
            states = step.reads[site].double().cpu()
            blocks.append((states * chosen[..., None]).sum(1) / counts)
        return self.guard.judge_rows(torch.cat(blocks, dim=1).numpy())

    def _over(self, row: int) -> bool:
        """Whether the row has ended by itself: what follows are pads."""
        ends = self.guard.model.backend.end_ids
        return bool(self.tokens[row]) and self.tokens[row][-1] in ends

    def _token(self, row: int, index: int, state: NDArray[np.float64], score: float) -> None:
        if self.tripped[row] is not None or index >= len(self.tokens[row]) or self._over(row):
            return
        self.scores[row].append(score)
        self.states[row].append(state)
        if self.on_token is not None:
            self.on_token(row, self.guard.model.tokenizer.decode([self.tokens[row][index]]), score)
        threshold = self.streaming.threshold
        if self.running[row].add(score) > (math.inf if threshold is None else threshold.value):
            self.tripped[row] = index
