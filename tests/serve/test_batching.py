"""The queue: nothing lost, nothing swapped, nothing left behind, and one bad prompt costs the others nothing."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from subspace_probe.serve.batching import Batcher


class Model:
    """Answers in capitals; fails at "bad"; waits while held."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, texts: Sequence[str]) -> list[str]:
        self.batches.append(list(texts))
        self.free.wait(10)
        if "bad" in texts:
            raise ValueError(f"bad among {len(texts)}")
        return [text.upper() for text in texts]


def run(
    test: "Callable[[Batcher[str], Model], Awaitable[None]]", model: Callable[..., Any] | None = None, **limits: Any
) -> None:
    """Run a test with a batcher in front of a model; at the end the queue must be empty."""
    from subspace_probe.serve.batching import Batcher

    async def main() -> None:
        with ThreadPoolExecutor(1) as thread:
            given: dict[str, Any] = {"max_batch": 4, "max_wait_s": 0.02, "limit": 100, "timeout_s": 5.0} | limits
            used = model or Model()
            batcher = Batcher[str](used, thread, **given)
            batcher.start()
            try:
                await test(batcher, used)  # pyright: ignore[reportArgumentType]
                assert batcher.held == 0
                assert not batcher._queue
            finally:
                if isinstance(used, Model):
                    used.free.set()
                await batcher.close()

    asyncio.run(main())


def test_answers_match_their_prompts_across_requests() -> None:
    async def test(batcher: "Batcher[str]", model: Model) -> None:
        asked = [[f"r{r} p{p}" for p in range(r % 6 + 1)] for r in range(40)]
        answers = await asyncio.gather(*(batcher.submit(texts) for texts in asked))
        assert answers == [[text.upper() for text in texts] for texts in asked]
        assert max(map(len, model.batches)) == 4
        assert sum(map(len, model.batches)) == sum(map(len, asked))
        assert len(model.batches) <= sum(map(len, asked)) / 4 + 2  # full ones, but for the first and the last

    run(test, limit=1000)


def test_one_bad_prompt_fails_alone() -> None:
    from subspace_probe.serve.batching import Failure

    async def test(batcher: "Batcher[str]", model: Model) -> None:
        *good, (bad,) = await asyncio.gather(*(batcher.submit([text]) for text in ("a", "b", "c", "bad")))
        assert good == [["A"], ["B"], ["C"]]
        assert isinstance(bad, Failure)
        assert str(bad.error) == "bad among 1"  # and nothing of the others in it
        assert [len(batch) for batch in model.batches] == [4, 2, 2, 1, 1]

    run(test)


def test_an_answer_too_few_is_no_answer_to_anybody() -> None:
    from subspace_probe.core.errors import BackendError
    from subspace_probe.serve.batching import Failure

    def forgetful(texts: Sequence[str]) -> list[str]:
        return [text.upper() for text in texts if text != "b"]

    async def test(batcher: "Batcher[str]", model: Model) -> None:
        a, b, c = await batcher.submit(["a", "b", "c"])
        assert (a, c) == ("A", "C")  # asked again, each with its own answer
        assert isinstance(b, Failure)
        assert isinstance(b.error, BackendError)

    run(test, forgetful)


def test_a_full_queue_refuses_and_recovers() -> None:
    from subspace_probe.serve.errors import Refused

    async def test(batcher: "Batcher[str]", model: Model) -> None:
        model.free.clear()
        first = asyncio.create_task(batcher.submit(list("abcdef")))
        await asyncio.sleep(0.05)
        with pytest.raises(Refused) as caught:
            await batcher.submit(["g"])
        assert caught.value.status_code == 429
        assert (caught.value.headers or {})["Retry-After"] == "1"
        assert batcher.held == 6
        model.free.set()
        assert await first == list("ABCDEF")
        assert await batcher.submit(["g"]) == ["G"]

    run(test, limit=6)


def test_out_of_time() -> None:
    from subspace_probe.serve.errors import Refused

    async def test(batcher: "Batcher[str]", model: Model) -> None:
        model.free.clear()
        with pytest.raises(Refused) as caught:
            await batcher.submit(list("abcdef"))
        assert (caught.value.status_code, caught.value.code) == (503, "timeout")
        model.free.set()
        assert await batcher.submit(["g"]) == ["G"]
        assert ["e", "f"] not in model.batches  # nobody waited for them any more

    run(test, timeout_s=0.1)


def test_a_caller_that_goes_takes_its_prompts_along() -> None:
    async def test(batcher: "Batcher[str]", model: Model) -> None:
        model.free.clear()
        running = asyncio.create_task(batcher.submit(["a"]))
        await asyncio.sleep(0.05)
        gone, stays = asyncio.create_task(batcher.submit(["b", "c"])), asyncio.create_task(batcher.submit(["d"]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        assert batcher.held == 2
        assert [item.text for item in batcher._queue] == ["d"]  # their texts are held no longer
        model.free.set()
        assert await running == ["A"]
        assert await stays == ["D"]
        assert model.batches == [["a"], ["d"]]

    run(test)


def test_closing_finishes_what_waits_and_takes_no_more() -> None:
    from subspace_probe.serve.errors import Refused

    async def test(batcher: "Batcher[str]", model: Model) -> None:
        model.free.clear()
        waiting = [asyncio.create_task(batcher.submit([text])) for text in "abcdefgh"]
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        assert not batcher.ready
        with pytest.raises(Refused) as caught:
            await batcher.submit(["late"])
        assert caught.value.status_code == 503
        model.free.set()
        await closing
        assert [await task for task in waiting] == [[text] for text in "ABCDEFGH"]

    run(test)


def test_a_lone_prompt_does_not_wait_for_a_full_batch() -> None:
    async def test(batcher: "Batcher[str]", model: Model) -> None:
        assert await batcher.submit(["a"]) == ["A"]  # within the time limit, though the batch never fills

    run(test, max_wait_s=0.01, timeout_s=2.0)
    with pytest.raises(Exception, match="no answer within"):  # the control: it does wait as long as it was told
        run(test, max_wait_s=10.0, timeout_s=0.1)
