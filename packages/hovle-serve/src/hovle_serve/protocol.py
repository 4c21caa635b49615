"""What `/v1/chat/completions` takes: the part of OpenAI's request that a HoVLE can do. Unknown fields are errors."""

from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

# Names of union members: pydantic puts them into an error's place, from where `_refuse` takes them out again.
_SYSTEM, _USER, _ASSISTANT, _STRING, _PARTS, _TEXT, _IMAGE = _TAGS = (
    "<system>", "<user>", "<assistant>", "<string>", "<parts>", "<text>", "<image>",
)  # fmt: skip


class RequestError(Exception):
    """A request that gets an error in OpenAI's shape. `param` is the field at fault, as `messages.0.content`."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientLeftError(Exception):
    """Nobody is there to read the answer."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ErrorDetail(Strict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Strict):
    """Every error's body."""

    error: ErrorDetail


class Limits(Strict):
    """Of one request. max_pixels and max_tiles are of all its pictures together."""

    max_body_bytes: int = 32 * 2**20
    max_messages: int = 256
    max_characters: int = 400_000
    max_images: int = 32
    max_pixels: int = 64_000_000
    max_tiles: int = 128


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str = Field(
        description="a data URI: data:image/png;base64,...; other URLs only where the server allows their host"
    )
    detail: Literal["auto", "high"] = "auto"  # a picture always gets the tiles its shape asks for


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


def _one_of(field: str, tags: dict[str, str]) -> Discriminator:
    """Picks a union's member by a field of its own."""

    def tag(value: Any) -> str | None:
        chosen = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
        return tags.get(chosen) if isinstance(chosen, str) else None

    return Discriminator(
        tag,
        custom_error_type="one_of",
        custom_error_message=f"an object whose {field} is one of {', '.join(tags)} is needed",
    )


def _string_or_parts(value: Any) -> str:
    return _STRING if isinstance(value, str) else _PARTS


Part = Annotated[
    Annotated[TextPart, Tag(_TEXT)] | Annotated[ImagePart, Tag(_IMAGE)],
    _one_of("type", {"text": _TEXT, "image_url": _IMAGE}),
]
Content = Annotated[
    Annotated[str, Tag(_STRING)] | Annotated[list[Part], Tag(_PARTS), Field(min_length=1)],
    Discriminator(_string_or_parts),
]
TextContent = Annotated[
    Annotated[str, Tag(_STRING)] | Annotated[list[TextPart], Tag(_PARTS), Field(min_length=1)],
    Discriminator(_string_or_parts),
]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: TextContent


Message = Annotated[
    Annotated[SystemMessage, Tag(_SYSTEM)]
    | Annotated[UserMessage, Tag(_USER)]
    | Annotated[AssistantMessage, Tag(_ASSISTANT)],
    _one_of("role", {"system": _SYSTEM, "developer": _SYSTEM, "user": _USER, "assistant": _ASSISTANT}),
]


class StreamOptions(Strict):
    include_usage: bool = False


def _as_list(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


class ChatRequest(Strict):
    """null stands for the default, as OpenAI has it. The last group of fields is taken only where it does nothing."""

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: float | None = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        Field(max_length=4),
        BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None),
    ] = []
    n: int | None = Field(1, ge=1, le=8)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    user: str | None = Field(None, max_length=256)
    frequency_penalty: float | None = Field(0.0, ge=0, le=0)
    presence_penalty: float | None = Field(0.0, ge=0, le=0)

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


def parse_request(body: bytes) -> ChatRequest:
    """Raises RequestError naming the field; broken UTF-8, halves of surrogates and deep nesting are no JSON here."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        _refuse(error)


def _refuse(error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise RequestError(400, f"the body is not valid JSON: {first['ctx']['error']}") from error
    place = ".".join(str(item) for item in first["loc"] if item not in _TAGS)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
    raise RequestError(400, f"{place}: {message}" if place else message, place or None) from error
