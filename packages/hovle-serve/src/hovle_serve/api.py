"""The HTTP face of one engine: OpenAI's chat completions, health, metrics, and the page at `/`."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hovle_core.processor import Encoded
from hovle_serve.completions import ClientLeftError, Completion, answer
from hovle_serve.engine import Engine, EngineClosedError, QueueFullError
from hovle_serve.metrics import Metrics
from hovle_serve.prompts import PromptEncoder
from hovle_serve.protocol import ChatRequest, Limits, RequestError, parse_request
from hovle_serve.sampling import Sampling

DEFAULT_MAX_TOKENS = 512
BODY_SECONDS = 60  # a body that takes longer to arrive is given up
MAX_READERS = 16  # bodies read and prepared at a time; times max_body_bytes is what they can hold
MAX_DECODERS = 2  # of these, requests whose pictures are decoded at a time
RETRY_AFTER = {"Retry-After": "1"}
_CLIENT_LEFT = 499  # nginx's number: nobody reads it
_REFS = "#/components/schemas/{model}"
# The page is one file that talks to this server only.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    engine: Engine, name: str, api_keys: Sequence[str] = (), limits: Limits | None = None
) -> FastAPI:
    """The app that serves `engine` as model `name`, and closes it at its shutdown.

    api_keys: one of them has to come as `Authorization: Bearer`, but for `/` and `/health`; none means everybody.
    """
    service = _Service(engine, name, api_keys, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="hovle-serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.exception_handler(RequestError)(_on_request_error)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(Exception)(_on_bug)
    schema = ChatRequest.model_json_schema(ref_template=_REFS)
    definitions = schema.pop("$defs")
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    app.post("/v1/chat/completions", openapi_extra={"requestBody": body}, response_model=None)(service.chat)
    app.get("/v1/models", response_model=None)(service.models)
    app.get("/v1/models/{model:path}", response_model=None)(service.model)
    app.get("/health", response_model=None)(service.health)
    app.get("/metrics", response_model=None)(service.metrics_page)
    app.get("/", response_class=HTMLResponse, response_model=None)(_page)

    document = get_openapi(title="hovle-serve", version="1", routes=app.routes)
    document.setdefault("components", {}).setdefault("schemas", {}).update(definitions)
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's documented way
    return app


class _Service:
    def __init__(self, engine: Engine, name: str, api_keys: Sequence[str], limits: Limits) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self._keys = [_digest(key) for key in api_keys]
        self._prompts = PromptEncoder(engine.processor, limits)
        self._readers = 0
        self._decoders = asyncio.Semaphore(MAX_DECODERS)

    # ---- routes ----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        try:
            response = await self._chat(request)
        except RequestError as error:
            response = _error(error)
        except (ClientLeftError, ClientDisconnect):
            response = Response(status_code=_CLIENT_LEFT)
        except Exception:
            self.metrics.responses.labels(500).inc()
            raise
        self.metrics.responses.labels(response.status_code).inc()
        return response

    async def models(self, request: Request) -> dict[str, Any]:
        self._authorize(request)
        return {"object": "list", "data": [self._model()]}

    async def model(self, request: Request, model: str) -> dict[str, Any]:
        self._authorize(request)
        self._check_model(model)
        return self._model()

    async def health(self) -> Response:
        running = self.engine.is_running
        return JSONResponse({"status": "ok" if running else "stopped"}, 200 if running else 503)

    async def metrics_page(self, request: Request) -> Response:
        self._authorize(request)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # ---- inside ----------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        self._authorize(request)
        body, prompt = await self._prepared(request)
        samplings = self._samplings(body, prompt)
        completion = Completion(
            self.name,
            self.engine.tokenizer,
            len(prompt.input_ids),
            int((prompt.input_ids == self.engine.processor.image_token_id).sum()),
            len(samplings),
        )
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        events = answer(self.engine, self.metrics, request, prompt, samplings, body.stop, top_logprobs)
        try:
            if not body.stream:
                return JSONResponse(await completion.whole(events))
            # What goes wrong before the first text still gets a status of its own.
            first = await anext(events)
        except QueueFullError as error:
            raise _busy(str(error)) from error
        except EngineClosedError as error:
            raise RequestError(503, str(error), headers=RETRY_AFTER) from error
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            completion.stream(first, events, usage, _failure),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _prepared(self, request: Request) -> tuple[ChatRequest, Encoded]:
        """Who finds the queue full is told so before the body is read and its pictures are decoded."""
        # Also keeps other sites' pages from posting here in a visitor's name: browsers ask first for this type.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "Content-Type must be application/json")
        if not self.engine.has_room() or self._readers >= MAX_READERS:
            raise _busy("too many requests wait already")
        self._readers += 1
        try:
            body = await asyncio.to_thread(parse_request, await _read(request, self.limits.max_body_bytes))
            self._check_model(body.model)
            async with self._decoders:
                prompt = await asyncio.to_thread(self._prompts.encode, body)
        finally:
            self._readers -= 1
        return body.model_copy(update={"messages": []}), prompt  # which may hold megabytes of pictures

    def _samplings(self, body: ChatRequest, prompt: Encoded) -> list[Sampling]:
        """How to draw each of the n answers; the seeds of the others follow the first's."""
        n = body.n or 1
        if n > self.engine.max_queue:
            raise RequestError(
                400, f"n: {n} is more than the {self.engine.max_queue} that the queue holds", "n"
            )
        try:
            limit = min(
                body.limit or DEFAULT_MAX_TOKENS, self.engine.room(prompt)
            )  # an upper bound, as in hovle chat
        except ValueError as error:
            raise RequestError(400, str(error), "messages", "context_length_exceeded") from error
        temperature = 1.0 if body.temperature is None else body.temperature
        return [
            Sampling(limit, temperature, body.top_p or 1.0, None if body.seed is None else body.seed + i)
            for i in range(n)
        ]

    def _authorize(self, request: Request) -> None:
        """Compares digests, all of them, in a time that says nothing about the keys."""
        if not self._keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestError(
                401, "a valid API key is needed: Authorization: Bearer ...", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _check_model(self, model: str) -> None:
        if model != self.name:
            raise RequestError(
                404, f"there is no model {model!r} here, only {self.name!r}", "model", "model_not_found"
            )

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "hovle"}


async def _read(request: Request, max_bytes: int) -> bytes:
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS), aclosing(request.stream()) as stream:
            async for chunk in stream:
                size += len(chunk)
                if size > max_bytes:  # uvicorn reads the rest and forgets it, so that the client hears why
                    raise RequestError(413, f"the body is larger than {max_bytes} bytes")
                chunks.append(chunk)
    except TimeoutError as error:
        raise RequestError(408, f"the body did not arrive within {BODY_SECONDS} seconds") from error
    return b"".join(chunks)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _busy(message: str) -> RequestError:
    return RequestError(429, message, code="queue_full", headers=RETRY_AFTER)


def _error(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _failure(error: Exception) -> dict[str, Any]:
    """What a client is told of an exception in the middle of a stream: of a bug, only that there was one."""
    stopped = isinstance(error, EngineClosedError)
    return RequestError(503 if stopped else 500, str(error) if stopped else "the answer failed").body


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The router's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    return _error(RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


async def _on_bug(request: Request, error: Exception) -> Response:
    return _error(RequestError(500, "the server failed to answer"))


async def _page() -> Response:
    page = files("hovle_serve").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(
        page, headers={"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
    )
