"""Who may ask: one token, compared in constant time."""

import hmac
from typing import final

from starlette.types import ASGIApp, Receive, Scope, Send

from subspace_probe.serve.errors import AUTHENTICATION, Refused

OPEN = frozenset({"/", "/healthz", "/readyz"})
"""Addresses that ask for no token: the page, which asks for it itself, and what a load balancer calls."""


@final
class Token:
    """Refuses whoever has not the token, before a byte of the body is read.

    Args:
        app: what is guarded.
        token: None lets everybody in.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = None if token is None else token.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._token is None or scope["path"] in OPEN or self._known(scope):
            await self._app(scope, receive, send)
            return
        refused = Refused(
            401,
            "This server asks for a token. Send it as 'Authorization: Bearer TOKEN'.",
            kind=AUTHENTICATION,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refused.response()(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        """Whether a header carries the token: OpenAI's clients send the one, LiteLLM's guardrail call the other."""
        sent = b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                sent = value[7:].strip()
            elif name == b"x-api-key" and not sent:
                sent = value.strip()
        return hmac.compare_digest(sent, self._token or b"")
