"""A server on a free loopback port, in a thread of this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from subspace_probe.guard.protocols import Judge


@contextmanager
def live(guard: "Judge", **settings: Any) -> Iterator[str]:
    """The address of a running server."""
    import socket

    from subspace_probe.serve.app import build
    from subspace_probe.serve.settings import ServerSettings

    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = build(guard, ServerSettings(**settings))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not stop"
