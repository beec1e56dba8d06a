"""What the server answers: OpenAI's moderation route, LiteLLM's guardrail route, token scores, health and counts."""

import json
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, final

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST

from subspace_probe.guard.judgements import Judgement
from subspace_probe.guard.moderation import result_of
from subspace_probe.serve import page, schema
from subspace_probe.serve.errors import UNKNOWN, Refused
from subspace_probe.serve.service import Service

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": schema.ErrorBody}, "5XX": {"model": schema.ErrorBody}}


@final
class StrictRequest(Request):
    """A request whose JSON is JSON, in UTF-8."""

    async def json(self) -> Any:
        """The body's value.

        Raises:
            Refused: no JSON; NaN and half of a surrogate pair, which Python would take, among it.
        """
        body = await self.body()
        try:
            text = body.decode("utf-8")
            value = json.loads(text, parse_constant=_no_number)
            if "\\ud" in text or "\\uD" in text:
                json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeError as error:
            raise Refused(400, "The body is not UTF-8 text.", code="invalid_unicode") from error
        except RecursionError as error:
            raise Refused(400, "The body is nested too deeply.", code="invalid_json") from error
        except ValueError as error:
            where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
            raise Refused(400, f"The body is not valid JSON{where}.", code="invalid_json") from error
        return value


@final
class StrictRoute(APIRoute):
    """A route that takes JSON only: a browser sends other types across sites without asking."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, given a strict request."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                message = f"The content type is {kind or 'not given'}. Send application/json."
                raise Refused(415, message, code="unsupported_media_type")
            strict_request = StrictRequest(request.scope, request.receive)
            if request.method == "POST" and not await strict_request.body():
                raise Refused(400, "The body is empty. Send JSON.", code="invalid_json")
            return await handle(strict_request)

        return strict


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def routes(service: Service) -> APIRouter:
    """All routes of a guard."""
    router = APIRouter(route_class=StrictRoute, responses=ERRORS)
    _moderation(router, service)
    _tokens(router, service)
    _guardrail(router, service)
    _models(router, service)
    _health(router, service)
    return router


def _moderation(router: APIRouter, service: Service) -> None:
    @router.post("/v1/moderations", response_model=schema.Moderation)
    async def moderations(body: schema.ModerationRequest) -> JSONResponse:
        """Judge a text, or several with one result each, or parts with one result for all together."""
        name = service.named(body.model)
        texts, places = _texts(body)
        judgements = await service.judge(texts, places)
        results = [result_of(judged, service.facts, strict=service.settings.strict) for judged in judgements]
        return JSONResponse({"id": f"modr-{uuid.uuid4().hex}", "model": name, "results": results})


def _texts(body: schema.ModerationRequest) -> tuple[list[str], list[str]]:
    """The texts to judge, and where each stands in the request.

    Raises:
        Refused: a picture among them.
    """
    if isinstance(body.input, str):
        return [body.input], ["input"]
    parts: list[str] = []
    for index, item in enumerate(body.input):
        if isinstance(item, schema.ImagePart):
            message = f"input[{index}] is a picture, and this guard reads text. Leave it out, or send it elsewhere."
            raise Refused(400, message, param=f"input[{index}]", code="unsupported_input_type")
        parts.append(item if isinstance(item, str) else item.text)
    if isinstance(body.input[0], str):
        return parts, [f"input[{index}]" for index in range(len(parts))]
    return ["\n".join(parts)], ["input"]


def _tokens(router: APIRouter, service: Service) -> None:
    @router.post("/v1/tokens", response_model=schema.Tokens)
    async def tokens(body: schema.TokensRequest) -> JSONResponse:
        """The score at every token of what the model is shown, beside the result for the whole."""
        name = service.named(body.model)
        (judged,) = await service.judge([body.input], ["input"])
        scored = await service.token_scores(body.input, "input")
        answer = {"object": "latent_guard.tokens", "model": name, "text": scored.text}
        answer |= {"spans": scored.spans, "scores": scored.scores, "position": scored.position}
        return JSONResponse(answer | {"result": result_of(judged, service.facts), "guard": service.facts})


def _guardrail(router: APIRouter, service: Service) -> None:
    @router.post("/beta/litellm_basic_guardrail_api", response_model=schema.Guardrail)
    async def guardrail(body: schema.GuardrailRequest) -> JSONResponse:
        """LiteLLM's generic guardrail: BLOCKED where any text is flagged. Pictures and tools are not judged.

        Each text is judged as if it were a prompt. The threshold promises a rate for one prompt: a harmless request
        with k texts is blocked up to k times as often, and for a model's answers (`input_type` "response") no rate was
        promised.
        """
        found = [(text, f"texts[{index}]") for index, text in enumerate(body.texts or ()) if text.strip()]
        if not found:  # a turn that only calls a tool has an empty text
            return JSONResponse({"action": "NONE"})
        texts, places = zip(*found, strict=True)
        judgements = await service.judge(texts, places)
        reason = _why_blocked(service, judgements, places)
        return JSONResponse({"action": "NONE"} if reason is None else {"action": "BLOCKED", "blocked_reason": reason})


def _why_blocked(service: Service, judgements: Sequence[Judgement], places: Sequence[str]) -> str | None:
    """What LiteLLM is told of texts that do not pass; None where all do."""
    name, pairs = service.settings.model_name, list(zip(judgements, places, strict=True))
    if flagged := [pair for pair in pairs if pair[0].flagged]:
        judged, place = max(flagged, key=lambda pair: pair[0].score)
        category = service.facts.get("category", "harmful")
        return f"{place} was judged {category} by {name}, probability {judged.probability:.3f}"
    if service.settings.block_abstained:
        for judged, place in pairs:
            if judged.abstained:
                return f"{name} abstained on {place}: it is unlike the harmless texts that the guard knows"
    return None


def _models(router: APIRouter, service: Service) -> None:
    name = service.settings.model_name
    own = {"id": name, "object": "model", "created": service.created, "owned_by": "subspace-probe"}
    own |= {"latent_guard": service.facts}

    @router.get("/v1/models", response_model=schema.Models)
    async def models() -> JSONResponse:
        """The guard, as the only model."""
        return JSONResponse({"object": "list", "data": [own]})

    @router.get("/v1/models/{model:path}", response_model=schema.Model)
    async def model(model: str) -> JSONResponse:
        """The guard, by its name."""
        if model != name:
            message = f"There is no such model here. The guard is called {name!r}."
            raise Refused(404, message, kind=UNKNOWN, param="model", code="model_not_found")
        return JSONResponse(own)


def _health(router: APIRouter, service: Service) -> None:
    html, headers = page.read()

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    @router.head("/healthz", include_in_schema=False)  # load balancers ask so
    @router.get("/healthz", response_model=schema.Status)
    async def healthz() -> JSONResponse:
        """Whether the process answers."""
        return JSONResponse({"status": "ok"})

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", response_model=schema.Status, responses={503: {"model": schema.Status}})
    async def readyz() -> JSONResponse:
        """Whether prompts are taken."""
        return JSONResponse(
            {"status": "ok"} if service.ready else {"status": "not ready"}, 200 if service.ready else 503
        )

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts, for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
