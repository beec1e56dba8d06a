"""Single requests to the application in this process: hostile ones, the gateway's, the token, the log, the counts."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.serve.inside import inside

if TYPE_CHECKING:
    from subspace_probe.serve.service import Service

JSON = {"Content-Type": "application/json"}
DEEP = 200_000


def during(test: "Callable[[httpx.AsyncClient, Service], Awaitable[None]]", **given: Any) -> None:
    """Run a test against an application; `stub` are the stub's own settings. The queue must be empty at the end."""
    from tests.serve.stub import StubGuard

    async def main() -> None:
        async with inside(StubGuard(**given.pop("stub", {})), **given) as (client, service):
            await test(client, service)
            assert service.held == 0

    asyncio.run(main())


def fault(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in a response, which must be in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    return error


# ---------------------------------------------------------------------------------------------------- hostile requests
@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b"[]", None, "invalid_value"),
        (b'"text"', None, "invalid_value"),
        (b"{}", "input", "invalid_value"),
        (b'{"input": null}', "input", "invalid_value"),
        (b'{"input": 3}', "input", "invalid_value"),
        (b'{"input": ""}', "input", "invalid_value"),
        (b'{"input": " \\n"}', "input", "empty_string"),
        (b'{"input": []}', "input", "invalid_value"),
        (b'{"input": ["a", " "]}', "input[1]", "empty_string"),
        (b'{"input": ["a", 1]}', "input[1]", "invalid_value"),
        (b'{"input": [[1, 2]]}', "input[0]", "invalid_value"),
        (b'{"input": [{"type": "text"}]}', "input[0].text", "invalid_value"),
        (b'{"input": [{"type": "audio"}]}', "input[0]", "invalid_value"),
        (b'{"input": [{"type": "text", "text": "a"}, "b"]}', "input[1]", "invalid_value"),
        (b'{"input": "a", "model": 3}', "model", "invalid_value"),
        (b'{"input": ' + b"[" * DEEP + b"]" * DEEP + b"}", None, "invalid_json"),
        (b'{"input": "a", "b": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}", None, "invalid_json"),
        (b'{"input": ' + b"9" * 100_000 + b"}", None, "invalid_json"),
        (b'{"input": NaN}', None, "invalid_json"),
        (b'{"input": "a", "b": -Infinity}', None, "invalid_json"),
        (b'{"input": "a\x00b"}', None, "invalid_json"),
        (b'{"input": "a\\u0000b"}', "input", "invalid_value"),
        (b'{"input": "a\\ud800b"}', None, "invalid_unicode"),
        (b'{"input": "a", "\\uDfff": 1}', None, "invalid_unicode"),
        (b'{"input": "a", "model": "\\ud83d"}', None, "invalid_unicode"),
        (b'{"input": "\xe9"}', None, "invalid_unicode"),
        ('{"input": "a"}'.encode("utf-16"), None, "invalid_unicode"),
        (b'{"input": [' + b"1," * 400_000 + b"1]}", "input[0]", "invalid_value"),
        (json.dumps({"input": ["a"] * 257}).encode(), "input", "too_many_inputs"),
        (json.dumps({"input": ["a", "b" * 100_001]}).encode(), "input[1]", "string_above_max_length"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else "",
)
def test_what_cannot_be_judged_is_a_clear_400(body: bytes, param: str | None, code: str) -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        error = fault(await client.post("/v1/moderations", content=body, headers=JSON), 400)
        assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
        assert len(error["message"]) < 400

    during(test, max_body_bytes=1 << 22)


@pytest.mark.parametrize(
    "text", ["\U0001f600", "é", "\u202eabc", "a\tb", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")]
)
def test_unusual_text_is_judged(text: str) -> None:
    """The control: what looks hostile and is not. Written both as escapes and as UTF-8."""
    from tests.serve.stub import score_of

    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        for escaped in (True, False):
            body = json.dumps({"input": text}, ensure_ascii=escaped).encode()
            response = await client.post("/v1/moderations", content=body, headers=JSON)
            assert response.json()["results"][0]["latent_guard"]["score"] == score_of(text)

    during(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_oversized_body_is_413(chunked: bool) -> None:
    """With its length announced, and without; a byte less is read."""
    body = b'{"input": "' + b"x" * 2000 + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    async def small(client: httpx.AsyncClient, service: "Service") -> None:
        sent = pieces() if chunked else body
        assert (
            fault(await client.post("/v1/moderations", content=sent, headers=JSON), 413)["code"] == "request_too_large"
        )

    async def enough(client: httpx.AsyncClient, service: "Service") -> None:
        sent = pieces() if chunked else body
        assert (await client.post("/v1/moderations", content=sent, headers=JSON)).status_code == 200

    during(small, max_body_bytes=len(body) - 1)
    during(enough, max_body_bytes=len(body))


def test_a_body_that_does_not_come_is_408() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b'{"input": '
        await asyncio.sleep(5)
        yield b'"a"}'

    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        fault(await client.post("/v1/moderations", content=slow(), headers=JSON), 408)

    during(test, timeout_s=0.1)


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_only_json_is_read(kind: str) -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        headers = {"Content-Type": kind} if kind else {}
        error = fault(await client.post("/v1/moderations", content=b'{"input": "a"}', headers=headers), 415)
        assert error["code"] == "unsupported_media_type"
        allowed = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert (await client.post("/v1/moderations", content=b'{"input": "a"}', headers=allowed)).status_code == 200

    during(test)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/moderations", 405), ("DELETE", "/", 405), ("GET", "/nothing", 404), ("GET", "/docs", 404)],
)
def test_wrong_addresses_and_methods(method: str, path: str, status: int) -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        fault(await client.request(method, path), status)

    during(test)


# ------------------------------------------------------------------------------------------------------------- answers
def test_strict_answers_have_nothing_of_ours() -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        (result,) = (await client.post("/v1/moderations", json={"input": "a"})).json()["results"]
        assert "latent_guard" not in result
        assert len(result["categories"]) == 13

    during(test, strict=True)


def test_a_bug_of_the_guard_is_a_500_of_that_request_only(caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        asked = ["secret bug", "one", "too long", "two"]
        answers = await asyncio.gather(*(client.post("/v1/moderations", json={"input": text}) for text in asked))
        assert [answer.status_code for answer in answers] == [500, 200, 400, 200]
        assert "secret" not in answers[0].text
        assert fault(answers[2], 400)["param"] == "input"

    with caplog.at_level(logging.INFO):
        during(test, max_wait_ms=50.0)
    assert "unforeseen IndexError" in caplog.text
    assert "stub.py" in caplog.text  # where
    assert "secret" not in caplog.text.replace('"secret bug"', "")  # what, only as a line of the source


def test_token_scores_and_the_decision_agree() -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        answer = (await client.post("/v1/tokens", json={"input": "a b c"})).json()
        assert answer["scores"][answer["position"]] == answer["result"]["latent_guard"]["score"]
        assert [answer["text"][a:b] for a, b in answer["spans"]] == ["<user>", "a", "b", "c", "<end>"]
        fault(await client.post("/v1/tokens", json={"input": "too long"}), 400)

    during(test, strict=True)  # the page needs the evidence in strict mode too


def test_busy_is_429_and_health_is_answered_all_the_same() -> None:
    import threading

    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        first = asyncio.create_task(client.post("/v1/moderations", json={"input": ["a", "b"]}))
        while service.held < 2:
            await asyncio.sleep(0.01)
        error = fault(await client.post("/v1/moderations", json={"input": ["c", "d"]}), 429)
        assert error["code"] == "rate_limit_exceeded"
        second = asyncio.create_task(client.post("/v1/moderations", json={"input": "c"}))
        while service.held < 3:
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/moderations", json={"input": "d"})
        assert "requests are under way" in fault(refused, 429)["message"]
        assert refused.headers["Retry-After"] == "1"
        assert (await client.get("/readyz")).status_code == 200
        hold.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]

    hold = threading.Event()
    during(test, queue_prompts=3, max_inputs=3, max_requests=2, stub={"hold": hold})


def test_health_is_told_to_those_who_ask_for_the_head_only() -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        for path in ("/healthz", "/readyz"):
            assert (await client.head(path)).status_code == 200
        assert (await client.head("/metrics", headers={"X-Api-Key": "open"})).status_code == 405  # the control

    during(test, token="open")


def test_out_of_time_is_503() -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        assert fault(await client.post("/v1/moderations", json={"input": "a"}), 503)["code"] == "timeout"

    during(test, timeout_s=0.05, stub={"seconds": 0.3})


def test_ready_only_while_it_runs() -> None:
    from subspace_probe.serve.app import build
    from tests.serve.stub import StubGuard

    async def main() -> None:
        app = build(StubGuard())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://guard") as client:
            for running in (False, True, False, True):  # a second life is as good as the first
                if running:
                    async with app.router.lifespan_context(app):
                        assert (await client.get("/readyz")).status_code == 200
                        assert (await client.post("/v1/moderations", json={"input": "a"})).status_code == 200
                else:
                    assert (await client.get("/readyz")).status_code == 503
                    fault(await client.post("/v1/moderations", json={"input": "a"}), 503)
                assert (await client.get("/healthz")).status_code == 200

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------------- LiteLLM
def test_litellm_blocks_what_is_flagged() -> None:
    from tests.serve.stub import score_of, text_that

    good, bad = text_that(flagged=False), text_that(flagged=True)

    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        async def asked(**body: Any) -> dict[str, Any]:
            response = await client.post("/beta/litellm_basic_guardrail_api", json=body)
            assert response.status_code == 200, response.text
            return response.json()

        sent = {"request_data": {"user_api_key_hash": "x"}, "litellm_call_id": "1", "litellm_trace_id": None}
        sent |= {
            "tools": [],
            "images": ["data:,"],
            "structured_messages": [],
            "additional_provider_specific_params": {},
        }
        assert await asked(texts=[good], input_type="request", **sent) == {"action": "NONE"}
        blocked = await asked(texts=[good, "", bad], input_type="response", **sent)
        assert blocked["action"] == "BLOCKED"
        assert blocked["blocked_reason"] == (
            f"texts[2] was judged harmful by latent-guard, probability {score_of(bad):.3f}"
        )
        for nothing in ([], [""], None):
            assert await asked(texts=nothing, input_type="request") == {"action": "NONE"}
        assert await asked(input_type="request") == {"action": "NONE"}

    during(test)


def test_litellm_blocks_an_abstention_where_told_to() -> None:
    from tests.serve.stub import score_of, text_that

    unsure = next(text for n in range(1000) if score_of(text := f"text {n}") < 0.1)  # the stub abstains there
    good = next(text for n in range(1000) if 0.1 < score_of(text := f"text {n}") < 0.7)

    def asked(*texts: str, **given: bool) -> dict[str, Any]:
        answers = []

        async def test(client: httpx.AsyncClient, service: "Service") -> None:
            answers.append(await client.post("/beta/litellm_basic_guardrail_api", json={"texts": texts}))

        during(test, **given)
        return answers[0].json()

    assert asked(good, unsure) == {"action": "NONE"}
    assert asked(good, block_abstained=True) == {"action": "NONE"}
    blocked = asked(good, unsure, block_abstained=True)
    assert blocked["action"] == "BLOCKED"
    assert "abstained on texts[1]" in blocked["blocked_reason"]
    flagged = asked(unsure, text_that(flagged=True), block_abstained=True)
    assert "texts[1] was judged harmful" in flagged["blocked_reason"]  # the stronger reason


def test_litellm_errors_close_the_gate() -> None:
    """LiteLLM lets nothing through on an error unless told to: what cannot be judged must be one."""

    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        path = "/beta/litellm_basic_guardrail_api"
        assert fault(await client.post(path, json={"texts": ["a", "too long"]}), 400)["param"] == "texts[1]"
        assert fault(await client.post(path, json={"texts": "a"}), 400)["param"] == "texts"
        fault(await client.post(path, json={"texts": ["secret bug"]}), 500)

    during(test)


# ----------------------------------------------------------------------------------------------------------- the token
def test_the_token_guards_all_but_the_page_and_health() -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        guarded = ["/v1/models", "/v1/models/latent-guard", "/metrics", "/openapi.json", "/nothing"]
        for path in guarded:
            assert fault(await client.get(path), 401)["code"] == "invalid_api_key"
        for path in ("/v1/moderations", "/v1/tokens", "/beta/litellm_basic_guardrail_api"):
            assert (await client.post(path, json={"input": "a"})).headers["WWW-Authenticate"] == "Bearer"
        for path in ("/", "/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 200
        for good in ({"Authorization": "Bearer open"}, {"Authorization": "bearer open"}, {"X-Api-Key": "open"}):
            assert (await client.get("/v1/models", headers=good)).status_code == 200
        wrong = [b"Bearer ope", b"Bearer openn", b"Bearer ", b"Bearer", b"open", b"Basic open", b"Bearer \xff\xfe", b""]
        for bad in wrong:
            assert (await client.get("/v1/models", headers={b"Authorization": bad})).status_code == 401

    during(test, token="open")


def test_the_body_of_a_stranger_is_not_read() -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        fault(await client.post("/v1/moderations", content=never(), headers=JSON), 401)

    during(test, token="open")


def test_the_token_is_in_no_repr() -> None:
    from subspace_probe.serve.settings import ServerSettings

    assert "open" not in repr(ServerSettings(token="open-sesame"))


# ------------------------------------------------------------------------------------------------ log, counts, settings
@pytest.mark.parametrize("asked_for", [False, True])
def test_no_prompt_is_logged_unless_asked_for(asked_for: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        await client.post("/v1/moderations", json={"input": "purple elephant\nINFO forged"})
        await client.post("/v1/tokens", json={"input": "purple elephant"})
        await client.post("/beta/litellm_basic_guardrail_api", json={"texts": ["purple elephant"]})
        await client.post("/v1/moderations?q=purple", json={"input": 3, "purple": "purple"})
        await client.get("/purple/elephant")

    with caplog.at_level(logging.DEBUG, logger="subspace_probe"):
        during(test, log_prompts=asked_for)
    assert "/v1/moderations 200" in caplog.text
    assert ("purple" in caplog.text) is asked_for
    assert "\nINFO forged" not in caplog.text  # a prompt cannot write a line of its own


def test_the_counts() -> None:
    from tests.serve.stub import text_that

    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        texts = [text_that(flagged=True), text_that(flagged=False), text_that(flagged=False)]
        await client.post("/v1/moderations", json={"input": texts})
        await client.post("/v1/moderations", json={"input": 3})
        await client.get("/purple")
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        for line in (
            'requests_total{route="/v1/moderations",status="200"} 1.0',
            'requests_total{route="/v1/moderations",status="400"} 1.0',
            'requests_total{route="unmatched",status="404"} 1.0',
            'request_seconds_count{route="/v1/moderations"} 2.0',
            "prompts_total 3.0",
            "flagged_total 1.0",
            "queue_prompts 0.0",
            "batch_prompts_sum 3.0",
        ):
            assert f"latent_guard_{line}\n" in answer.text
        assert "purple" not in answer.text

    during(test)


def test_the_page_loads_nothing_from_elsewhere() -> None:
    async def test(client: httpx.AsyncClient, service: "Service") -> None:
        page = await client.get("/")
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert "//" not in page.text.replace("// ", "")
        assert "innerHTML" not in page.text

    during(test)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"token": ""},
        {"token": "with space"},
        {"token": "ünicode"},
        {"max_batch": 0},
        {"max_wait_ms": -1.0},
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
        {"max_inputs": 5000},
        {"max_inputs": 200, "queue_prompts": 100},
        {"max_characters": 10**9},
        {"model_name": " "},
    ],
    ids=str,
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.serve.settings import ServerSettings

    with pytest.raises(ConfigError):
        ServerSettings(**wrong)


def test_what_only_this_machine_reaches() -> None:
    from subspace_probe.serve.settings import ServerSettings

    local = {
        host: ServerSettings(host=host).local for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", "::", "a.b")
    }
    assert [host for host, is_local in local.items() if is_local] == ["127.0.0.1", "::1", "localhost"]


def test_without_the_extra_the_line_to_install_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import importlib.util

    import subspace_probe.serve
    from subspace_probe.core.errors import MissingExtra

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else object())
    with pytest.raises(MissingExtra, match=r"needs fastapi\. Install: pip install 'subspace-probe\[serve\]'"):
        importlib.reload(subspace_probe.serve)
