"""What requests may hold, with stated limits, and what answers hold.

Lists stop at their first fault: a body of a million wrong items must not become a million error messages.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, JsonValue, Tag

from subspace_probe.serve.settings import MOST_CHARACTERS, MOST_INPUTS

Text = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]


class TextPart(BaseModel):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImagePart(BaseModel):
    """A picture, as OpenAI's clients send it. Understood, and refused: the guard reads text."""

    type: Literal["image_url"]
    image_url: JsonValue = None


Part = Annotated[TextPart | ImagePart, Discriminator("type")]


def _kind(value: Any) -> str | None:
    """Which form an input has; a list is of parts where its first item is an object."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "parts" if value and isinstance(value[0], dict | BaseModel) else "texts"
    return None


Input = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Tag("texts"), Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
    | Annotated[list[Part], Tag("parts"), Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)],
    Discriminator(
        _kind,
        custom_error_type="input_type",
        custom_error_message="Give a text, a list of texts, or a list of parts (type 'text' and its text)",
    ),
]
Name = Annotated[str, Field(max_length=200)]


class ModerationRequest(BaseModel):
    """Body of `POST /v1/moderations`: a text, several texts (a result each), or parts (one result of all together)."""

    input: Input
    model: Name | None = None


class TokensRequest(BaseModel):
    """Body of `POST /v1/tokens`."""

    input: Text
    model: Name | None = None


class GuardrailRequest(BaseModel):
    """Body of LiteLLM's generic guardrail call; what the guard does not use is left unread."""

    texts: list[Annotated[str, Field(max_length=MOST_CHARACTERS)]] | None = Field(
        default=None, max_length=MOST_INPUTS, fail_fast=True
    )
    input_type: Literal["request", "response"] = "request"


class Result(BaseModel):
    """One moderation result."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]
    latent_guard: dict[str, JsonValue] | None = None


class Moderation(BaseModel):
    """Answer of `POST /v1/moderations`."""

    id: str
    model: str
    results: list[Result]


class Tokens(BaseModel):
    """Answer of `POST /v1/tokens`: the score at every token of `text`, and the result for the whole.

    `spans` count characters (code points) of `text`; `position` is the token that decides, -1 for the mean over all.
    """

    object: Literal["latent_guard.tokens"]
    model: str
    text: str
    spans: list[tuple[int, int]]
    scores: list[float]
    position: int
    result: Result
    guard: dict[str, JsonValue]


class Guardrail(BaseModel):
    """Answer to LiteLLM."""

    action: Literal["BLOCKED", "NONE"]
    blocked_reason: str | None = None


class Model(BaseModel):
    """The guard, as OpenAI's clients list models; `latent_guard` is what the guard says of itself."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    latent_guard: dict[str, JsonValue]


class Models(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """Whether the server lives, or is ready."""

    status: Literal["ok", "not ready"]


class Fault(BaseModel):
    """What went wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: Fault
