"""Sockets that open and say too little: they are cut off, and the server goes on answering others."""

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from tests.serve.live import live

HALF = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
LIMITS = {"max_connections": 20, "header_s": 0.5}


def dial(address: str) -> socket.socket:
    url = httpx.URL(address)
    return socket.create_connection((url.host, url.port or 0), timeout=10)


@contextmanager
def half_open(address: str, number: int) -> Iterator[list[socket.socket]]:
    """Sockets that sent two lines of headers, and no more."""
    opened = [dial(address) for _ in range(number)]
    try:
        for one in opened:
            with suppress(ConnectionError):  # one too many, and cut off already
                one.sendall(HALF)
        yield opened
    finally:
        for one in opened:
            one.close()


def ended(one: socket.socket, within: float) -> bool:
    """Whether the server ends a connection within some seconds, without a word."""
    one.settimeout(within)
    try:
        return one.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def healthy(address: str, within: float) -> bool:
    """Whether /healthz answers within some seconds to a client that tries again when it is cut off."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        with suppress(httpx.TransportError):
            return httpx.get(f"{address}/healthz", timeout=within).status_code == 200
        time.sleep(0.05)
    return False


def test_half_open_connections_are_closed_and_others_answered() -> None:
    from tests.serve.stub import StubGuard

    with live(StubGuard(), **LIMITS) as address, half_open(address, 30) as opened:
        assert healthy(address, 10)
        assert all(ended(one, 10) for one in opened)
        assert healthy(address, 10)


def test_uvicorns_own_protocol_does_not_close_them() -> None:
    """The control of the test above."""
    from tests.serve.stub import StubGuard

    with live(StubGuard(), stock=True, **LIMITS) as address, half_open(address, 30) as opened:
        time.sleep(0.8)
        assert not any(ended(one, 0.01) for one in opened)


def test_one_too_many_is_closed_at_once_and_room_comes_back() -> None:
    from tests.serve.stub import StubGuard

    with live(StubGuard(), max_connections=3, header_s=60.0) as address:
        with half_open(address, 3) as opened:
            assert not any(ended(one, 0.1) for one in opened)
            with dial(address) as fourth:
                assert ended(fourth, 10)
            assert not any(ended(one, 0.1) for one in opened)
        assert healthy(address, 10)


@pytest.mark.slow
def test_a_slow_request_passes_if_its_headers_are_in_time() -> None:
    from tests.serve.stub import StubGuard

    body = b'{"input": "one"}'
    head = b"POST /v1/moderations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    sent = head % len(body) + body
    with live(StubGuard(seconds=0.7), header_s=0.5) as address, dial(address) as client:
        for turn in range(2):  # the second on the same connection, after a rest longer than headers may take
            for start in range(0, len(sent), 40):
                client.sendall(sent[start : start + 40])
                time.sleep(0.02)
            answer = b""
            while not answer.endswith(b"}"):
                more = client.recv(65536)
                assert more, turn
                answer += more
            assert answer.startswith(b"HTTP/1.1 200"), turn
            time.sleep(0.7)
        client.sendall(HALF)
        assert ended(client, 10)  # here the time counts from the first byte


def test_a_body_may_take_longer_than_headers() -> None:
    from tests.serve.stub import StubGuard

    head = b"POST /v1/moderations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n"
    with live(StubGuard(), header_s=0.2) as address, dial(address) as client:
        client.sendall(head)
        time.sleep(0.6)
        client.sendall(b'{"input": "one"}')
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_no_timer_is_left_behind() -> None:
    """A protocol forgets its timer once headers are complete, once they never will be, and when it is cut off."""
    import asyncio

    import uvicorn
    from uvicorn.server import ServerState

    from subspace_probe.serve.app import build
    from subspace_probe.serve.connections import LimitedProtocol, server
    from subspace_probe.serve.settings import ServerSettings
    from tests.serve.stub import StubGuard

    settings = ServerSettings(header_s=60.0)
    config: uvicorn.Config = server(build(StubGuard(), settings), settings).config
    config.load()

    async def left(*sent: bytes) -> list[bool]:
        made: list[LimitedProtocol] = []
        loop, state = asyncio.get_running_loop(), ServerState()

        def factory() -> LimitedProtocol:
            made.append(config.http_protocol_class(config=config, server_state=state, app_state={}))  # pyright: ignore
            return made[0]

        listening = await loop.create_server(factory, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        seen = []
        for data in sent:
            writer.write(data)
            await asyncio.sleep(0.1)
            seen.append(made[0]._late is not None)
        writer.transport.abort()
        await asyncio.sleep(0.1)
        seen.append(made[0]._late is not None)
        listening.close()
        await asyncio.gather(*state.tasks)
        assert not state.connections
        return seen

    assert asyncio.run(left(HALF)) == [True, False]
    assert asyncio.run(left(HALF, b"\r\n", HALF)) == [True, False, True, False]
    assert asyncio.run(left(b"no request\r\n\r\n")) == [False, False]


def test_never_more_connections_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.serve.connections import most_connections

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    endless = resource.RLIM_INFINITY
    for soft, hard, most, raised in (
        (256, 256, 192, [(256, 256)]),
        (256, 400, 336, [(400, 400)]),
        (256, 4096, 512, [(576, 4096)]),
        (256, endless, 512, [(576, endless)]),
        (4096, 4096, 512, []),
        (endless, endless, 512, []),
        (10, 10, 1, [(10, 10)]),
    ):
        asked.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limits=(soft, hard): limits)
        assert most_connections(512) == most
        assert asked == raised
