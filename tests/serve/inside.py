"""The application in this process, without sockets."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from subspace_probe.guard.protocols import Judge
    from subspace_probe.serve.service import Service


@asynccontextmanager
async def inside(guard: "Judge", **settings: Any) -> "AsyncIterator[tuple[httpx.AsyncClient, Service]]":
    """A client of a running application, and what stands behind it."""
    from subspace_probe.serve.app import build
    from subspace_probe.serve.settings import ServerSettings

    app = build(guard, ServerSettings(**settings))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://guard") as client,
    ):
        yield client, app.state.service
