"""What `/v1/chat/completions` takes: the part of OpenAI's request that a HoVLE can do. Unknown fields are errors.

OpenAI's other fields are taken where they ask for nothing, as clients send them: null, empty, or OpenAI's default.
"""

from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

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


def shown(text: str) -> str:
    """What an error repeats of a client's text, which may be a body long, and longer in an answer."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


class ClientLeftError(Exception):
    """Nobody is there to read the answer."""


# Pydantic collects whatever is wrong, at more than a kilobyte each: there must not be many places for it. Lists stop at
# the first (`fail_fast`), objects have no more fields than this, and a request no more parts beside its pictures.
MAX_FIELDS = 64
MAX_PARTS = 2048
MAX_SHOWN = 100
# Values outside of texts. Each takes a byte or two of a body, and a hundred of memory.
MAX_VALUES = 100_000


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields", f"{len(value)} fields, at most {MAX_FIELDS} are taken"
            )
        return value


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


# Pydantic speaks of Python's types.
_NEEDED = {"model_type": "an object", "dict_type": "an object", "list_type": "an array"}
_CANNOT = "this server cannot do that: leave the field out"


def _off(value: bool) -> bool:
    if value:
        raise ValueError(_CANNOT)
    return value


# Of fields that ask for what is not done here, when they hold anything. Literal[False] would take 0.
_Off = Annotated[bool, AfterValidator(_off), WithJsonSchema({"type": "boolean", "const": False})] | None
_NoList = Annotated[list[Any], Field(max_length=0)] | None
_NoDict = Annotated[dict[str, Any], Field(max_length=0)] | None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str = Field(
        description="a data URI: data:image/png;base64,...; other URLs only where the server allows their host"
    )
    detail: Literal["auto", "high", "low"] | None = Field(
        "auto", description="low: the picture in one tile; else in as many as its shape asks for"
    )


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


def _string_or_parts(parts: str) -> Discriminator:
    def tag(value: Any) -> str | None:
        return _STRING if isinstance(value, str) else _PARTS if isinstance(value, list) else None

    return Discriminator(
        tag,
        custom_error_type="string_or_parts",
        custom_error_message=f"a string or an array of {parts} is needed",
    )


Part = Annotated[
    Annotated[TextPart, Tag(_TEXT)] | Annotated[ImagePart, Tag(_IMAGE)],
    _one_of("type", {"text": _TEXT, "image_url": _IMAGE}),
]
Content = Annotated[
    Annotated[str, Tag(_STRING)] | Annotated[list[Part], Tag(_PARTS), Field(min_length=1, fail_fast=True)],
    _string_or_parts("text and image_url parts"),
]
TextContent = Annotated[
    Annotated[str, Tag(_STRING)]
    | Annotated[list[TextPart], Tag(_PARTS), Field(min_length=1, fail_fast=True)],
    _string_or_parts("text parts"),
]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: TextContent
    name: None = None  # the chat template has no place for one


class UserMessage(Strict):
    role: Literal["user"]
    content: Content
    name: None = None


class AssistantMessage(Strict):
    """The last group of fields comes with an answer that a client gives back as it got it."""

    role: Literal["assistant"]
    content: TextContent
    name: None = None

    refusal: None = None
    annotations: _NoList = None
    audio: None = None
    function_call: None = None
    tool_calls: _NoList = None


Message = Annotated[
    Annotated[SystemMessage, Tag(_SYSTEM)]
    | Annotated[UserMessage, Tag(_USER)]
    | Annotated[AssistantMessage, Tag(_ASSISTANT)],
    _one_of("role", {"system": _SYSTEM, "developer": _SYSTEM, "user": _USER, "assistant": _ASSISTANT}),
]


class StreamOptions(Strict):
    include_usage: bool | None = False
    include_obfuscation: _Off = None


class ResponseFormat(Strict):
    type: Literal["text"]


def _as_list(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


class ChatRequest(Strict):
    """null stands for the default, as OpenAI has it. The last group is taken only where it asks for nothing."""

    model: str
    messages: list[Message] = Field(min_length=1, fail_fast=True)
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
    safety_identifier: str | None = Field(None, max_length=256)
    prompt_cache_key: str | None = Field(None, max_length=256)
    frequency_penalty: float | None = Field(0.0, ge=0, le=0)
    presence_penalty: float | None = Field(0.0, ge=0, le=0)
    audio: None = None
    function_call: Literal["none", "auto"] | None = None  # without functions
    functions: _NoList = None
    logit_bias: _NoDict = None
    metadata: _NoDict = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    moderation: None = None
    parallel_tool_calls: bool | None = None  # of no tools
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: Literal["medium"] | None = None
    response_format: ResponseFormat | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: _Off = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: _NoList = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None

    # Of the field rather than of the whole, so that the error names it; `info.data` holds the fields above it.
    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("max_tokens") is not None:
            raise ValueError("means the same as max_tokens: give one of them")
        return limit

    @field_validator("stream_options", "top_logprobs")
    @classmethod
    def _with_its_switch(cls, value: Any, info: ValidationInfo) -> Any:
        switch = {"stream_options": "stream", "top_logprobs": "logprobs"}[info.field_name or ""]
        if value is not None and not info.data.get(switch):
            raise ValueError(f"needs {switch}: true")
        return value

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


def parse_request(body: bytes, limits: Limits) -> ChatRequest:
    """Raises RequestError naming the field; broken UTF-8, halves of surrogates and deep nesting are no JSON here.

    `limits` bound what this costs, whatever the body is; who reads the messages looks at the rest of them.
    """
    marks = sum(map(body.count, b",[{"))  # every value follows one, and texts may hold them as well
    _at_most(limits.max_characters + MAX_VALUES, marks, "commas and brackets in the body", None)
    try:
        request = from_json(body)
    except ValueError as error:
        why = str(error)
        for escape in ("unexpected end of hex escape", "lone leading surrogate in hex escape"):
            why = why.replace(escape, "half a surrogate pair, which is no character,")
        raise RequestError(400, f"the body is not valid JSON: {why}") from error
    _check_lengths(request, limits)
    try:
        return ChatRequest.model_validate(request)
    except ValidationError as error:
        _refuse(error)


def _check_lengths(request: Any, limits: Limits) -> None:
    messages = request.get("messages") if isinstance(request, dict) else None
    if not isinstance(messages, list):
        return
    _at_most(limits.max_messages, len(messages), "messages")
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    pictures = sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts)
    _at_most(limits.max_images, pictures, "pictures")
    _at_most(limits.max_images + MAX_PARTS, len(parts), "parts")


def _at_most(most: int, number: int, what: str, param: str | None = "messages") -> None:
    if number > most:
        raise RequestError(400, f"{number} {what}, at most {most} are taken", param)


def _refuse(error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(shown(str(item)) for item in first["loc"] if item not in _TAGS)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
    elif first["type"] == "none_required" or first.get("ctx", {}).get("max_length") == 0:
        message = _CANNOT
    elif needed := _NEEDED.get(first["type"]):
        message = f"{needed} is needed"
    raise RequestError(400, f"{place}: {message}" if place else message, place or None) from error
