"""One model, many clients: prompts of all requests wait in one queue, and one thread takes them in batches.

A batch that fails is halved until the prompts that made it fail stand alone, so that a bad prompt costs its own request
an error and the others nothing; nor can what an error says of one client's prompt reach another client.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar, final

from subspace_probe.core.errors import BackendError
from subspace_probe.serve.errors import SERVER, Refused, busy

Answer = TypeVar("Answer")


@final
@dataclass(frozen=True)
class Failure:
    """What a prompt came to that has no answer. A value, since an exception that nobody fetches is logged in full."""

    error: BaseException


@final
@dataclass(eq=False)
class _Item(Generic[Answer]):
    """One prompt that waits, and where its answer goes."""

    text: str
    arrived: float
    answer: "asyncio.Future[Answer | Failure]" = field(repr=False)


@final
class Batcher(Generic[Answer]):
    """A queue in front of a function that takes prompts and returns one answer each.

    Args:
        run: called in `executor` with up to `max_batch` prompts.
        executor: one thread, shared by all that use the model.
        max_batch: prompts a call.
        max_wait_s: for a batch to fill, from the arrival of its first prompt.
        limit: prompts accepted and not yet answered.
        timeout_s: from a request's arrival to its answer.
        on_batch: told the size of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[str]], Sequence[Answer]],
        executor: Executor,
        *,
        max_batch: int,
        max_wait_s: float,
        limit: int,
        timeout_s: float,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run, self._executor, self._on_batch = run, executor, on_batch
        self._max_batch, self._max_wait_s, self._limit, self._timeout_s = max_batch, max_wait_s, limit, timeout_s
        self._queue: OrderedDict[_Item[Answer], None] = OrderedDict()  # in order; anywhere out of it in one step
        self._held = 0
        self._more = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def held(self) -> int:
        """Prompts accepted and not yet answered."""
        return self._held

    @property
    def ready(self) -> bool:
        """Whether prompts are taken."""
        return self._worker is not None and not self._worker.done() and not self._closed

    def start(self) -> None:
        """Begin to work; called with the event loop running."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Take no more prompts, and finish those that wait, within the time limit."""
        self._closed = True
        self._more.set()
        if self._worker is not None:
            await asyncio.wait([self._worker], timeout=self._timeout_s)
            self._worker.cancel()

    async def submit(self, texts: Sequence[str]) -> list[Answer | Failure]:
        """The answers to prompts, in order; a `Failure` in place of one that has none.

        A caller that is cancelled takes its prompts out of the queue.

        Raises:
            Refused: no room (429), not in time, or not ready (503).
        """
        if not self.ready:
            raise Refused(503, "The server takes no requests now.", kind=SERVER, code="not_ready")
        if self._held + len(texts) > self._limit:
            raise busy(f"{self._held} prompts are waiting, and the queue holds {self._limit}. Come back in a second.")
        loop = asyncio.get_running_loop()
        items = [_Item[Answer](text, loop.time(), loop.create_future()) for text in texts]
        self._queue.update(dict.fromkeys(items))
        self._held += len(items)
        self._more.set()
        try:
            async with asyncio.timeout(self._timeout_s):
                return [await item.answer for item in items]
        except TimeoutError:
            message = f"There was no answer within {self._timeout_s:g} s. Send fewer prompts, or come back later."
            raise Refused(503, message, kind=SERVER, code="timeout", headers={"Retry-After": "1"}) from None
        finally:
            self._held -= len(items)
            for item in items:
                item.answer.cancel()  # where it is not there yet
                self._queue.pop(item, None)

    async def _work(self) -> None:
        while self._queue or not self._closed:
            self._more.clear()
            if not self._queue:
                await self._more.wait()
                continue
            await self._fill()
            await self._answer(
                [self._queue.popitem(last=False)[0] for _ in range(min(self._max_batch, len(self._queue)))]
            )

    async def _fill(self) -> None:
        """Wait until a batch is full, or its first prompt has waited long enough."""
        if self._closed:
            return
        oldest = next(iter(self._queue))
        with suppress(TimeoutError):
            async with asyncio.timeout_at(oldest.arrived + self._max_wait_s):
                while len(self._queue) < self._max_batch and not self._closed:
                    self._more.clear()
                    await self._more.wait()

    async def _answer(self, items: Sequence[_Item[Answer]]) -> None:
        items = [item for item in items if not item.answer.done()]  # whoever asked may be gone
        if not items:
            return
        self._on_batch(len(items))
        visit = asyncio.get_running_loop().run_in_executor(self._executor, self._run, [item.text for item in items])
        await asyncio.wait([visit])
        error = visit.exception()
        answers = visit.result() if error is None else ()
        if error is None and len(answers) != len(items):
            error = BackendError(f"{len(items)} prompts went in, and {len(answers)} answers came out.")
        if error is not None and len(items) > 1:
            await self._answer(items[: len(items) // 2])
            await self._answer(items[len(items) // 2 :])
            return
        for item, answer in zip(items, answers if error is None else [Failure(error)], strict=True):
            if not item.answer.done():
                item.answer.set_result(answer)
