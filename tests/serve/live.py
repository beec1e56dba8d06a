"""A server on a free loopback port, in a thread of this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from subspace_probe.guard.protocols import Judge


@contextmanager
def live(guard: "Judge", *, stock: bool = False, **settings: Any) -> Iterator[str]:
    """The address of a running server; a stock one has uvicorn's own protocol."""
    import socket

    from subspace_probe.serve.app import build
    from subspace_probe.serve.connections import server as limited
    from subspace_probe.serve.settings import ServerSettings

    with socket.create_server(("127.0.0.1", 0)) as listener:
        chosen = ServerSettings(**settings)
        app = build(guard, chosen)
        plain = uvicorn.Config(app, http="h11", log_config=None, access_log=False, ws="none")
        server = uvicorn.Server(plain) if stock else limited(app, chosen)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not stop"
