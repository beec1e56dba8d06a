"""A guard as a web application, and the process that serves it."""

import logging
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from subspace_probe.core.errors import ConfigError
from subspace_probe.guard.protocols import Judge
from subspace_probe.serve.auth import Token
from subspace_probe.serve.connections import server
from subspace_probe.serve.errors import answer_all
from subspace_probe.serve.limits import Limits
from subspace_probe.serve.metrics import Watch
from subspace_probe.serve.routes import routes
from subspace_probe.serve.service import Service
from subspace_probe.serve.settings import ServerSettings

LOG = logging.getLogger("subspace_probe.serve")


def build(guard: Judge, settings: ServerSettings | None = None) -> FastAPI:
    """The application: any ASGI server can run it, in one process.

    Args:
        guard: a fitted guard.
        settings: limits and the token; host and port are `serve`'s.

    Raises:
        ConfigError: a guard that describes itself with something no JSON can hold.
    """
    settings = settings or ServerSettings()
    service = Service(guard, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    # No pages of documentation: they load scripts from elsewhere. The schema itself is at /openapi.json.
    app = FastAPI(
        title="latent guard", version=version("subspace-probe"), docs_url=None, redoc_url=None, lifespan=lifespan
    )
    token_in_schema = [] if settings.token is None else [Security(HTTPBearer(auto_error=False))]
    app.include_router(routes(service), dependencies=token_in_schema)
    app.state.service = service
    answer_all(app)
    # The last one added stands outermost: count, then ask for the token, and only then read the body.
    app.add_middleware(Limits, settings=settings)
    app.add_middleware(Token, token=settings.token)
    app.add_middleware(Watch, metrics=service.metrics)
    return app


def serve(guard: Judge, settings: ServerSettings | None = None) -> None:
    """Answer requests until the process is told to stop (SIGTERM, SIGINT); what is under way is finished first.

    Args:
        guard: a fitted guard.
        settings: where to listen, who may ask, and how much.

    Raises:
        ConfigError: an address that cannot be listened on.
    """
    settings = settings or ServerSettings()
    _say(logging.INFO)
    if settings.token is None and not settings.local:
        LOG.warning(
            "Whoever reaches %r can ask this server: there is no token. Set one, or listen on 127.0.0.1.", settings.host
        )
    with _listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        ready = server(build(guard, settings), settings)
        LOG.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        # uvicorn sends itself the signal again once it is done; by then, stopping is no longer news.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            ready.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {settings.host!r}, port {settings.port}: {error.strerror or error}. Choose another port "
            "(0 picks a free one) or address."
        ) from error


def _say(level: int) -> None:
    """Let the server's lines be seen where the program has not said what to do with them."""
    if not LOG.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOG.addHandler(handler)
        LOG.setLevel(level)
