"""What one request may cost: its body is read within a size and a time, and whoever hangs up is forgotten.

The body is read whole before the application sees it. From then on the connection is only listened to for its end, upon
which the work is cancelled: a client that is gone leaves nothing in the queue.
"""

import asyncio
import logging
import traceback
from typing import final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from subspace_probe.serve.errors import Refused, busy, failed
from subspace_probe.serve.settings import ServerSettings

LOG = logging.getLogger("subspace_probe.serve")
UNCOUNTED = frozenset({"/healthz", "/readyz"})
"""Answered however busy the server is, without reading a body: being busy is no reason to be restarted."""


@final
class _Gone(Exception):
    """The client hung up."""


@final
class Limits:
    """Holds requests to size, number and time.

    Args:
        app: what answers.
        settings: the limits.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings, self._under_way = app, settings, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            await self._app(scope, receive, send)
            return
        self._under_way += 1
        try:
            if self._under_way > self._settings.max_requests:
                raise busy(f"{self._settings.max_requests} requests are under way. Come back in a second.")
            async with asyncio.timeout(self._settings.timeout_s):
                body = await self._read(receive)
            await self._answer(scope, body, receive, send)
        except _Gone:
            return
        except TimeoutError:
            message = f"The request did not arrive within {self._settings.timeout_s:g} s."
            await Refused(408, message, code="timeout", headers={"Connection": "close"}).response()(
                scope, receive, send
            )
        except Refused as refused:
            await refused.response()(scope, receive, send)
        finally:
            self._under_way -= 1

    async def _read(self, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            Refused: it is larger.
            _Gone: the client hung up.
        """
        limit, body, more = self._settings.max_body_bytes, bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:  # uvicorn throws away what else comes, so that the client gets to read the answer
                message = f"The body is larger than {limit} bytes. Send fewer or shorter texts in one request."
                raise Refused(413, message, code="request_too_large")
        return bytes(body)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Let the application answer, unless the client hangs up first."""
        started, unread = False, [body]
        hung_up = asyncio.create_task(_end(receive))

        async def again() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await asyncio.shield(hung_up)
            return {"type": "http.disconnect"}

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        answer = asyncio.create_task(self._app(scope, again, sending))  # pyright: ignore[reportArgumentType]
        try:
            await asyncio.wait([answer, hung_up], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answer, hung_up):
                task.cancel()
        if not answer.done() or answer.cancelled():
            raise _Gone
        if (error := answer.exception()) is not None:
            report(error, quiet=not self._settings.log_prompts)
            if not started:
                raise failed()


async def _end(receive: Receive) -> None:
    """Return when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def report(error: BaseException, *, quiet: bool) -> None:
    """Write an unforeseen error into the log: its type and the lines it came through.

    Args:
        error: what was raised.
        quiet: leave out its message, which may quote a prompt.
    """
    where = "".join(traceback.format_tb(error.__traceback__))
    said = "" if quiet else f": {error}"
    LOG.error("unforeseen %s%s\n%s", type(error).__qualname__, said.encode("unicode_escape").decode(), where)
