"""What the server counts, for Prometheus, and one line a request in the log; neither holds a word of any prompt."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from subspace_probe.guard.judgements import Judgement

LOG = logging.getLogger("subspace_probe.serve")
GONE = "gone"
"""Stands for the status where the client hung up before there was one."""


@final
class Metrics:
    """Counters of one server, in a registry of their own: two servers in a process do not add up.

    Args:
        waiting: tells how many prompts are accepted and not yet answered.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        mine = {"registry": self._registry, "namespace": "latent_guard"}
        self.requests = Counter("requests", "Requests by route and status.", ["route", "status"], **mine)
        self.seconds = Histogram("request_seconds", "From the first byte to the last.", ["route"], **mine)
        self.prompts = Counter("prompts", "Prompts judged.", **mine)
        self.flagged = Counter("flagged", "Prompts flagged.", **mine)
        self.abstained = Counter("abstained", "Prompts whose state is unlike anything the guard has seen.", **mine)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        self.batch = Histogram("batch_prompts", "Prompts in one visit to the model.", buckets=sizes, **mine)
        Gauge("queue_prompts", "Prompts accepted and not yet answered.", **mine).set_function(waiting)

    def judged(self, judgements: Sequence[Judgement]) -> None:
        """Count judgements that were made."""
        self.prompts.inc(len(judgements))
        self.flagged.inc(sum(judgement.flagged for judgement in judgements))
        self.abstained.inc(sum(judgement.abstained for judgement in judgements))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


@final
class Watch:
    """Counts and logs each request by the route it matched: an address as it was sent may hold anything.

    Args:
        app: what answers.
        metrics: where to count.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = GONE, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            took = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(took)
            LOG.info("%s %s %s %.1f ms", scope["method"], route, status, 1000 * took)
