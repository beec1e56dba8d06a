"""The guard as requests see it: names, texts that can be judged, and errors that name their place."""

import json
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar, final

from subspace_probe.core.errors import DataError, PositionError
from subspace_probe.core.plain import plain
from subspace_probe.guard.judgements import Judgement, TokenScores
from subspace_probe.guard.protocols import Judge
from subspace_probe.serve.batching import Batcher, Failure
from subspace_probe.serve.errors import SERVER, UNKNOWN, Refused
from subspace_probe.serve.metrics import Metrics
from subspace_probe.serve.settings import ServerSettings

LOG = logging.getLogger("subspace_probe.serve")
OPENAI_NAMES = frozenset(
    {"omni-moderation-latest", "omni-moderation-2024-09-26", "text-moderation-latest", "text-moderation-stable"}
)
"""Models that clients ask for without being told to; the guard answers to them, under its own name."""
Answer = TypeVar("Answer")


@final
class Service:
    """A guard with its queue.

    Args:
        guard: what judges; used from one thread only.
        settings: of the server.
    """

    def __init__(self, guard: Judge, settings: ServerSettings) -> None:
        self.guard, self.settings, self.facts = guard, settings, plain(guard.describe(), "describe()")
        self.created = int(time.time())
        self.metrics = Metrics(lambda: self.held)
        self._judging: Batcher[Judgement] | None = None
        self._scoring: Batcher[TokenScores] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The thread and the queues, and at the end what still waits in them is finished."""
        chosen = self.settings
        limits: dict[str, Any] = {"limit": chosen.queue_prompts, "timeout_s": chosen.timeout_s}
        thread = ThreadPoolExecutor(1, thread_name_prefix="guard")
        judging = Batcher[Judgement](
            self.guard.judge,
            thread,
            max_batch=chosen.max_batch,
            max_wait_s=chosen.max_wait_ms / 1000,
            on_batch=self.metrics.batch.observe,
            **limits,
        )
        scoring = Batcher[TokenScores](self._score, thread, max_batch=1, max_wait_s=0.0, **limits)
        self._judging, self._scoring = judging, scoring
        judging.start()
        scoring.start()
        try:
            yield
        finally:
            await judging.close()
            await scoring.close()
            thread.shutdown(wait=False, cancel_futures=True)

    @property
    def held(self) -> int:
        """Prompts accepted and not yet answered."""
        return sum(queue.held for queue in (self._judging, self._scoring) if queue is not None)

    @property
    def ready(self) -> bool:
        """Whether prompts are taken."""
        return self._judging is not None and self._judging.ready

    def named(self, model: str | None) -> str:
        """The guard's name, if it is what was asked for.

        Raises:
            Refused: another model.
        """
        own = self.settings.model_name
        if model is None or model == own or model in OPENAI_NAMES:
            return own
        message = f"There is no model {model!r} here. The guard is called {own!r}; GET /v1/models lists it."
        raise Refused(404, message, kind=UNKNOWN, param="model", code="model_not_found")

    async def judge(self, texts: Sequence[str], places: Sequence[str]) -> list[Judgement]:
        """Judge texts, in one queue with those of all other requests.

        Args:
            texts: to judge.
            places: where each stands in the request, for errors.

        Raises:
            Refused: a text that cannot be judged, or no room, or not in time.
        """
        self._check(texts, places)
        judgements = _answers(await _queue(self._judging).submit(texts), places)
        self.metrics.judged(judgements)
        if self.settings.log_prompts:
            for text, judgement in zip(texts, judgements, strict=True):
                LOG.info("score %.4f flagged %s prompt %s", judgement.score, judgement.flagged, json.dumps(text))
        return judgements

    async def token_scores(self, text: str, place: str) -> TokenScores:
        """The score at every token of one text.

        Raises:
            Refused: as `judge`.
        """
        self._check([text], [place])
        (scores,) = _answers(await _queue(self._scoring).submit([text]), [place])
        return scores

    def _score(self, texts: Sequence[str]) -> list[TokenScores]:
        return [self.guard.token_scores(text) for text in texts]

    def _check(self, texts: Sequence[str], places: Sequence[str]) -> None:
        chosen = self.settings
        if len(texts) > chosen.max_inputs:
            message = f"There are {len(texts)} texts, and one request may hold {chosen.max_inputs}. Send several."
            raise Refused(400, message, param=places[0].partition("[")[0], code="too_many_inputs")
        for text, place in zip(texts, places, strict=True):
            if len(text) > chosen.max_characters:
                message = f"{place} has {len(text)} characters, and the most is {chosen.max_characters}. Shorten it."
                raise Refused(400, message, param=place, code="string_above_max_length")
            if not text.strip():
                raise Refused(400, f"{place} is empty or only white space.", param=place, code="empty_string")
            if "\x00" in text:  # some tokenizers end a text there, and would hide what follows from the guard
                raise Refused(400, f"{place} holds a null character. Take it out.", param=place, code="invalid_value")


def _queue(batcher: Batcher[Answer] | None) -> Batcher[Answer]:
    if batcher is None:
        raise Refused(503, "The server takes no requests now.", kind=SERVER, code="not_ready")
    return batcher


def _answers(answers: Sequence[Answer | Failure], places: Sequence[str]) -> list[Answer]:
    """All answers, if there are all; a text that the guard cannot read is the client's error, all else is ours."""
    found: list[Answer] = []
    for answer, place in zip(answers, places, strict=True):
        if not isinstance(answer, Failure):
            found.append(answer)
        elif isinstance(answer.error, DataError | PositionError):
            # It failed alone, as prompt 0: in the request it is another.
            message = re.sub(r"\b[Pp]rompt 0\b", place, str(answer.error), count=1)
            raise Refused(400, f"{place}: {message}", param=place, code="invalid_input") from answer.error
        else:
            raise answer.error
    return found
