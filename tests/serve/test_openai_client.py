"""OpenAI's own client against a live server: it reads our answers, and our errors as its exceptions."""

import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.serve.live import live


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from tests.serve.stub import StubGuard

    with live(StubGuard(), token="let-me-in", max_inputs=8) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="let-me-in", max_retries=0, timeout=20) as client:
        yield client


def test_the_client_reads_a_moderation(client: openai.OpenAI) -> None:
    from subspace_probe.guard.moderation import CANONICAL
    from tests.serve.stub import score_of, text_that

    good, bad = text_that(flagged=False), text_that(flagged=True)
    answer = client.moderations.create(input=[good, bad, good])
    assert [result.flagged for result in answer.results] == [False, True, False]
    assert answer.id.startswith("modr-")
    assert answer.model == "latent-guard"
    categories = answer.results[1].categories.to_dict()
    assert set(categories) == {*CANONICAL, "harmful"}
    assert [name for name, value in categories.items() if value] == ["harmful"]
    assert answer.results[1].category_scores.to_dict()["harmful"] == pytest.approx(score_of(bad))
    assert answer.results[1].categories.self_harm_intent is False
    assert answer.results[1].category_applied_input_types.violence == []
    evidence = (answer.results[1].model_extra or {})["latent_guard"]
    assert evidence["layers"] == [3, 4]
    assert evidence["bound"] == 0.0075


def test_one_text_one_result(client: openai.OpenAI) -> None:
    assert len(client.moderations.create(input="one").results) == 1


def test_parts_are_one_text(client: openai.OpenAI) -> None:
    from tests.serve.stub import score_of

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    (result,) = client.moderations.create(input=parts).results  # pyright: ignore[reportArgumentType]
    assert (result.model_extra or {})["latent_guard"]["score"] == score_of("one\ntwo")


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["latent-guard"]
    assert client.models.retrieve("latent-guard").owned_by == "subspace-probe"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-x")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["omni-moderation-latest", "text-moderation-stable", "latent-guard"])
def test_usual_names_are_taken(client: openai.OpenAI, name: str) -> None:
    assert client.moderations.create(input="one", model=name).model == "latent-guard"


def test_another_model_is_not_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.moderations.create(input="one", model="gpt-x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_picture_is_refused(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "data:,x"}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.moderations.create(input=parts)  # pyright: ignore[reportArgumentType]
    assert (caught.value.code, caught.value.param) == ("unsupported_input_type", "input[1]")


def test_a_prompt_that_the_guard_cannot_read_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.moderations.create(input=["one", "too long"])
    assert (caught.value.code, caught.value.param) == ("invalid_input", "input[1]")
    assert "longer than the context" in caught.value.message


def test_too_many_inputs(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.moderations.create(input=["x"] * 9)
    assert (caught.value.code, caught.value.param) == ("too_many_inputs", "input")


def test_a_wrong_token(address: str) -> None:
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="let-me-out", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.moderations.create(input="one")
    assert caught.value.code == "invalid_api_key"


def test_a_full_queue_is_a_rate_limit() -> None:
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from tests.serve.stub import StubGuard

    hold = threading.Event()
    with (
        live(StubGuard(hold=hold), max_inputs=1, queue_prompts=1) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as hasty,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=5) as patient,
        ThreadPoolExecutor(1) as thread,
    ):
        first = thread.submit(hasty.moderations.create, input="one")
        while "queue_prompts 1.0" not in httpx.get(f"{address}/metrics").text:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as caught:
            hasty.moderations.create(input="two")
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"
        threading.Timer(0.2, hold.set).start()
        assert patient.moderations.create(input="two").results  # it comes back by itself, as told
        assert first.result(20).results


def test_the_servers_own_fault_is_500() -> None:
    from tests.serve.stub import StubGuard

    with (
        live(StubGuard(nan=True)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.moderations.create(input="one")
    assert caught.value.code == "internal_error"
