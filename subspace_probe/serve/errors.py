"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}}, whatever went wrong.

A message names the place and the rule. What it quotes of a request goes back to whoever sent that, and into no log.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

INVALID, UNKNOWN, SERVER = "invalid_request_error", "not_found_error", "server_error"
AUTHENTICATION, RATE = "authentication_error", "rate_limit_error"


class Refused(HTTPException):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what was asked, what was found, what to do.
        kind: OpenAI's `type`.
        param: the place in the request, such as "input[3]".
        code: for programs.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.kind, self.param, self.code = kind, param, code

    def response(self) -> JSONResponse:
        """The answer to send."""
        error = {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, status_code=self.status_code, headers=self.headers)


def busy(message: str) -> Refused:
    """There is no room now; come back in a second."""
    return Refused(429, message, kind=RATE, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def failed() -> Refused:
    """The server's own fault; what it was stands in its log only."""
    return Refused(
        500, "The guard failed on this request; the server's log says where.", kind=SERVER, code="internal_error"
    )


def answer_all(app: FastAPI) -> None:
    """Every error of the app, and of the framework below it, in the one shape."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)


async def _http(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, Refused):
        return error.response()
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    messages = {
        404: ("There is nothing at this address. See /openapi.json for what there is.", UNKNOWN, "unknown_url"),
        405: ("This address does not take this method. See /openapi.json.", INVALID, "method_not_allowed"),
    }
    message, kind, code = messages.get(status, ("The request could not be read.", INVALID, "invalid_request"))
    return Refused(status, message, kind=kind, code=code, headers=headers).response()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    first: Mapping[str, Any] = found[0] if found else {"loc": (), "msg": "Invalid request", "type": "invalid"}
    param = place(first["loc"])
    message = f"{param or 'The request'}: {_clean(str(first['msg']))}."
    return Refused(400, message, param=param, code="invalid_value").response()


def place(loc: Sequence[int | str]) -> str | None:
    """A place in the request as OpenAI writes it: ("body", "input", "texts", 3) is "input[3]"."""
    steps = list(loc[1:])
    if steps[:1] == ["input"]:  # what follows is the union's member that was tried, and the same again for a part
        tried = steps.pop(1) if len(steps) > 1 else ""
        if tried == "parts" and len(steps) > 2:
            steps.pop(2)
    written = "".join(f"[{step}]" if isinstance(step, int) else f".{_clean(step)}" for step in steps)
    return written.removeprefix(".") or None


def _clean(text: str) -> str:
    """The text without lone surrogates, which no answer could carry, and not longer than a line."""
    return text.encode("utf-8", "replace").decode("utf-8")[:200]
