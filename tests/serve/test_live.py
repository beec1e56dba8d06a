"""Over real connections: a thousand clients at once, clients that hang up, and a process that is told to stop."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serve.live import live

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from tests.serve.stub import StubGuard
from subspace_probe.serve.app import serve
from subspace_probe.serve.settings import ServerSettings
serve(StubGuard(seconds=float(sys.argv[1])), ServerSettings(port=0, token="open", max_connections=2048))
"""


@contextmanager
def process(folder: Path, seconds: float = 0.0) -> "Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]":
    """A server in a process of its own, whose working and temporary folder is `folder`/work, and a client of it."""
    work, log = folder / "work", folder / "log"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(work), "PYTHONDONTWRITEBYTECODE": "1"}
    with log.open("wb") as errors:  # a file: a pipe that nobody reads fills up, and then the server waits
        command = [sys.executable, "-c", PROGRAM, str(seconds)]
        server = subprocess.Popen(command, cwd=work, env=environment, stderr=errors)
    try:
        while not (lines := log.read_text().splitlines()):
            assert server.poll() is None, "the server did not start"
            time.sleep(0.05)
        assert "listening on http://127.0.0.1:" in lines[0]
        headers = {"Authorization": "Bearer open"}
        with httpx.Client(base_url=lines[0].split()[-1], headers=headers, timeout=20) as client:
            yield server, client
    finally:
        server.kill()
        server.wait(10)
    assert list(work.iterdir()) == []  # however it ended, it left no files


async def ask(host: str, port: int, text: str) -> tuple[dict[str, Any], float]:
    """One request over a connection of its own, and the seconds it took."""
    body = json.dumps({"input": text}).encode()
    head = f"POST /v1/moderations HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer open\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    status, _, found = answer.partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 200"), answer[:300]
    return json.loads(found), time.perf_counter() - began


def rss(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_thousand_requests_at_once(tmp_path: Path) -> None:
    """Each gets the answer to its own text, and requests leave no memory behind."""
    from tests.serve.stub import score_of

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))

    async def thousand(port: int, turn: int) -> list[float]:
        texts = [f"turn {turn} request {n} " + "x" * (n % 500) for n in range(1000)]
        answers = await asyncio.gather(*(ask("127.0.0.1", port, text) for text in texts))
        for text, (answer, _) in zip(texts, answers, strict=True):
            (result,) = answer["results"]
            assert result["latent_guard"]["score"] == score_of(text)
        assert len({answer["id"] for answer, _ in answers}) == 1000
        return [seconds for _, seconds in answers]

    with process(tmp_path, seconds=0.002) as (server, client):
        port = client.base_url.port or 0
        took, memory = [], []
        for turn in range(4):  # not all of the first are under way at the same time: they are accepted a few at once
            took += asyncio.run(thousand(port, turn))
            memory.append(rss(server.pid))
        counts = client.get("/metrics").text
    assert "latent_guard_prompts_total 4000.0" in counts
    assert "latent_guard_queue_prompts 0.0" in counts
    # MiB: more at once than ever before takes more once; what every request leaves, if only a KiB, every turn adds
    assert np.diff(memory).min() < 1, memory
    p50, p95 = 1000 * np.quantile(took, [0.5, 0.95])
    print(f"1,000 at once, stub of 2 ms a batch: p50 {p50:.0f} ms, p95 {p95:.0f} ms; memory {memory} MiB")


def test_a_client_that_hangs_up_leaves_nothing() -> None:
    import threading

    from tests.serve.stub import StubGuard

    async def hang_up(port: int) -> None:
        body = json.dumps({"input": ["one", "two"]}).encode()
        head = "POST /v1/moderations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        for sent in (head.encode() + body, head.encode() + body[:5], head.encode()[:20]):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.transport.abort()  # a reset, as from a client that was killed
        await asyncio.sleep(0.1)

    hold = threading.Event()
    guard = StubGuard(hold=hold)
    with live(guard) as address, httpx.Client(base_url=address) as client:
        port = client.base_url.port or 0
        blocker = threading.Thread(target=lambda: httpx.post(f"{address}/v1/moderations", json={"input": "first"}))
        blocker.start()
        while "queue_prompts 1.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        asyncio.run(hang_up(port))
        assert "queue_prompts 1.0" in client.get("/metrics").text  # the one that stays
        hold.set()
        blocker.join(10)
        counts = client.get("/metrics").text
    assert "queue_prompts 0.0" in counts
    assert 'status="gone"' in counts
    assert guard.batches == [1]  # the model never saw what nobody waits for


def test_a_client_that_sends_too_much_reads_why() -> None:
    from tests.serve.stub import StubGuard

    with live(StubGuard()) as address:
        response = httpx.post(f"{address}/v1/moderations", json={"input": "x" * (20 << 20)}, timeout=20)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_what_is_under_way(number: signal.Signals, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with process(tmp_path, seconds=0.6) as (server, client), ThreadPoolExecutor(1) as thread:
        answer = thread.submit(client.post, "/v1/moderations", json={"input": "one"})
        time.sleep(0.3)  # it is with the model by now
        server.send_signal(number)
        assert answer.result(20).status_code == 200
        assert server.wait(20) == 0


@pytest.mark.slow
def test_killed_it_leaves_no_files(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with process(tmp_path, seconds=5.0) as (server, client), ThreadPoolExecutor(1) as thread:
        answer = thread.submit(client.post, "/v1/moderations", json={"input": "one"})
        time.sleep(0.3)
        server.kill()
        assert isinstance(answer.exception(20), httpx.TransportError)
        assert server.wait(20) == -signal.SIGKILL


def test_a_port_that_is_taken() -> None:
    import socket

    from subspace_probe.core.errors import ConfigError
    from subspace_probe.serve.app import serve
    from subspace_probe.serve.settings import ServerSettings
    from tests.serve.stub import StubGuard

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="Choose another port"):
        serve(StubGuard(), ServerSettings(port=taken.getsockname()[1]))


def test_open_to_all_without_a_token_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    import uvicorn

    from subspace_probe.serve.app import serve
    from subspace_probe.serve.settings import ServerSettings
    from tests.serve.stub import StubGuard

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
        for settings, warned in (
            (ServerSettings(port=0), False),
            (ServerSettings(port=0, host="0.0.0.0", token="open"), False),
            (ServerSettings(port=0, host="0.0.0.0"), True),
        ):
            caplog.clear()
            serve(StubGuard(), settings)
            assert ("there is no token" in caplog.text) is warned
