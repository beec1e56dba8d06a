"""What a connection may cost before there is a request: how many are open, and how long their headers may take.

A socket that sends half a request's headers and waits is no request yet: nothing in the application sees it. Here it is
counted and timed. The parser is always h11, though uvicorn takes httptools where that is installed: the limits stand on
what h11 says of the state of a connection.
"""

import asyncio
import socket
from typing import ClassVar

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from subspace_probe.serve.settings import ServerSettings

try:
    import resource
except ImportError:  # Windows counts no files
    resource = None

RESERVED_FILES = 64
"""File descriptors kept from connections: for the model's files, and for connections about to be refused."""
ACCEPTED_A_TURN = 4
"""Connections that the event loop accepts at once, before any is counted; one too many is closed four turns later."""
WAITING = 2048
"""Connections that the system holds until they are accepted."""


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 on one of at most `max_connections` connections, with `header_s` seconds for a request's headers.

    The seconds count from the opening of the connection, and on one that is kept alive from the first byte of the next
    request. Whoever takes longer, or comes as one too many, is cut off without an answer.
    """

    max_connections: ClassVar[int]
    header_s: ClassVar[float]
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Count the connection, and begin to wait for the first request."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Read on; the time runs while a request has begun and its headers are not complete."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget()
        elif self._late is None:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave no timer behind."""
        self._forget()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._late = self.loop.call_later(self.header_s, self.transport.abort)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """Takes few connections in one turn of the event loop, while the system holds many that wait.

    asyncio accepts as many connections at once as the system may hold, all before the first of them is counted. So it
    is told of few, and the system of more.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and then let more connections wait."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(WAITING)


def server(app: ASGIApp, settings: ServerSettings) -> Server:
    """A server that is not started yet.

    Args:
        app: what answers.
        settings: of connections and time.
    """
    return Server(
        uvicorn.Config(
            app,  # pyright: ignore[reportArgumentType]
            http=_limited(settings),
            backlog=ACCEPTED_A_TURN,
            log_config=None,
            access_log=False,  # its lines hold addresses as they were sent; ours hold routes
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=int(settings.timeout_s) + 1,
        )
    )


def most_connections(wanted: int) -> int:
    """The number of connections wanted, or fewer where the process may not open so many files.

    The process asks for as many files as the system grants it; most systems begin it with 1,024 and allow it more.
    """
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if 0 <= soft < needed:  # below 0: no limit
        soft = needed if hard < 0 else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft < 0 else max(1, min(wanted, soft - RESERVED_FILES))


def _limited(settings: ServerSettings) -> type[LimitedProtocol]:
    """The protocol with its limits; uvicorn makes one of this class for each connection."""

    class Limited(LimitedProtocol):
        max_connections = most_connections(settings.max_connections)
        header_s = settings.header_s

    return Limited
