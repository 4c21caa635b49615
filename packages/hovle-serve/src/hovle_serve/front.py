"""What every HTTP face has in common: keys, bodies read within limits, errors in OpenAI's shape, the page at `/`."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Lifespan, Message, Receive, Scope, Send

from hovle_serve.access import Access
from hovle_serve.protocol import (
    ChatRequest,
    ClientLeftError,
    ErrorBody,
    Limits,
    RequestError,
    parse_request,
    shown,
)

BODY_SECONDS = 60  # a body that takes longer to arrive is given up
IDLE_SECONDS = 10  # and one of which nothing comes for so long
WRITE_SECONDS = 60  # so is a client that takes nothing for so long
# Bodies that are read or prepared hold no more than so many of the largest. Who has sent nothing holds nothing.
MAX_BODIES = 16
MAX_PREPARED = 256  # at a time, however small
SMALL_BODY = 2**16  # MAX_PREPARED of these have room of their own, beside large ones that come slowly
RETRY_AFTER = {"Retry-After": "1"}
_CLIENT_LEFT = 499  # nginx's number: nobody reads it
_REFS = "#/components/schemas/{model}"
# The page is one file that talks to this server only.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Front(ABC):
    """The routes of an app that answers for the models `names`.

    A request is first read and prepared, within MAX_BODIES and MAX_PREPARED, and then answered.
    """

    relays = False  # whether `respond` still needs the body as it came, which then counts until it returns

    def __init__(
        self, names: Sequence[str], access: Access, limits: Limits, registry: CollectorRegistry
    ) -> None:
        self.names, self.limits = tuple(names), limits
        self.created = int(time.time())
        self.registry = registry
        self.responses = Counter(
            "hovle_responses", "Answers to /v1/chat/completions", ["status"], registry=registry
        )
        self._access = access
        self._held_bytes = self._prepared_now = 0

    @abstractmethod
    def check_room(self) -> None:
        """Raise RequestError while nobody is taken: before a body is read and its pictures are decoded."""

    @abstractmethod
    async def prepare(self, body: ChatRequest, raw: bytes) -> Any:
        """What `respond` needs of a body that came as `raw`."""

    @abstractmethod
    async def respond(self, request: Request, prepared: Any) -> Response: ...

    @abstractmethod
    def is_healthy(self) -> bool: ...

    @property
    def is_open(self) -> bool:
        """Whether everybody may ask."""
        return self._access.is_open

    # ---- routes ----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        try:
            response = await self._chat(request)
        except RequestError as error:
            response = _error(error)
        except (ClientLeftError, ClientDisconnect):
            response = Response(status_code=_CLIENT_LEFT)
        except Exception:
            self.responses.labels(500).inc()
            raise
        self.responses.labels(response.status_code).inc()
        return response

    async def models(self, request: Request) -> dict[str, Any]:
        self.authorize(request)
        return {"object": "list", "data": [self._model(name) for name in self.names]}

    async def model(self, request: Request, model: str) -> dict[str, Any]:
        self.authorize(request)
        self._check_model(model)
        return self._model(model)

    async def health(self) -> Response:
        healthy = self.is_healthy()
        return JSONResponse({"status": "ok" if healthy else "stopped"}, 200 if healthy else 503)

    async def metrics(self, request: Request) -> Response:
        self.authorize(request)
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def authorize(self, request: Request) -> bytes | None:
        return self._access.authorize(request.headers.get("authorization", ""))

    async def _chat(self, request: Request) -> Response:
        key = self.authorize(request)
        # Also keeps other sites' pages from posting here in a visitor's name: browsers ask first for this type.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "Content-Type must be application/json")
        if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
            raise RequestError(415, f"Content-Encoding {encoding!r} is not taken: send the JSON as it is")
        self._access.enter(key)
        try:
            response = await self._answered(request)
        except BaseException:
            self._access.leave(key)
            raise
        return _Watched(response, lambda: self._access.leave(key))

    async def _answered(self, request: Request) -> Response:
        self.check_room()
        async with self._received(request) as raw:
            # Nothing here refers to what was prepared, so that `respond` may let go of it.
            response = self.respond(request, await self._prepared(request, raw))
            del raw
            if self.relays:
                return await response
        return await response

    @asynccontextmanager
    async def _received(self, request: Request) -> AsyncIterator[bytes]:
        """A body; its bytes count until the block ends."""
        chunks: list[bytes] = []
        held = 0
        try:
            async with aclosing(_body(request, self.limits.max_body_bytes)) as body:
                async for chunk in body:
                    chunks.append(chunk)
                    held += len(chunk)
                    self._held_bytes += len(chunk)
                    reserve = MAX_PREPARED * SMALL_BODY if held <= SMALL_BODY else 0
                    if self._held_bytes > MAX_BODIES * self.limits.max_body_bytes + reserve:
                        raise busy("too many large requests are in work")
            chunks[:] = [b"".join(chunks)]
            yield chunks.pop()
        finally:
            self._held_bytes -= held

    async def _prepared(self, request: Request, raw: bytes) -> Any:
        if self._prepared_now >= MAX_PREPARED:
            raise busy("too many requests are being read")
        self._prepared_now += 1
        try:
            body = await asyncio.to_thread(parse_request, raw, self.limits)
            self._check_model(body.model)
            return await unless_left(request, self.prepare(body, raw))
        finally:
            self._prepared_now -= 1

    def _check_model(self, model: str) -> None:
        if model not in self.names:
            known = ", ".join(map(repr, self.names))
            raise RequestError(
                404, f"there is no model {shown(model)!r} here, only {known}", "model", "model_not_found"
            )

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "hovle"}


class _Watched(Response):
    """A response whose client is given up when it takes nothing for WRITE_SECONDS; then, or at its end, `ended()`."""

    def __init__(self, response: Response, ended: Callable[[], None]) -> None:
        self.response, self.ended = response, ended
        self.status_code, self.background = response.status_code, response.background

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def timely(message: Message) -> None:
            try:
                async with asyncio.timeout(WRITE_SECONDS):
                    await send(message)
            except TimeoutError as error:
                raise ClientLeftError from error

        try:
            await self.response(scope, receive, timely)
        except* (ClientLeftError, ClientDisconnect):
            pass  # the connection is closed behind us, its answer being incomplete
        finally:
            self.ended()
            body = getattr(self.response, "body_iterator", None)
            if isinstance(body, AsyncGenerator):
                await body.aclose()


def routes(service: Front, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The app of a front."""
    app = FastAPI(
        title="hovle-serve", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.exception_handler(RequestError)(_on_request_error)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(Exception)(_on_bug)
    schema = ChatRequest.model_json_schema(ref_template=_REFS)
    if service.is_open:  # who has no key is not told what there is
        schema["properties"]["model"]["enum"] = list(service.names)
    definitions = schema.pop("$defs")
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    refused: dict[int | str, dict[str, Any]]
    stream: dict[int | str, dict[str, Any]]
    stream = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
    refused = {kind: {"model": ErrorBody, "description": "error"} for kind in ("4XX", "5XX")}
    post, get = partial(app.post, response_model=None), partial(app.get, response_model=None)
    chat = {"requestBody": body}
    post("/v1/chat/completions", openapi_extra=chat, responses=refused | stream)(service.chat)
    get("/v1/models", responses=refused)(service.models)
    get("/v1/models/{model:path}", responses=refused)(service.model)
    get("/health", responses={503: {}})(service.health)
    get("/metrics", response_class=PlainTextResponse, responses=refused)(service.metrics)
    get("/", response_class=HTMLResponse)(_page)
    for path, probed in (("/health", service.health), ("/", _page)):  # some load balancers ask so
        app.head(path, include_in_schema=False, response_model=None)(probed)

    document = get_openapi(title="hovle-serve", version="1", routes=app.routes)
    document.setdefault("components", {}).setdefault("schemas", {}).update(definitions)
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's documented way
    return app


async def _body(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """A body as it comes. Raises RequestError for one that is too large, or too slow."""
    # uvicorn reads the rest of a large one and forgets it, so that the client hears why
    too_large = RequestError(413, f"the body is larger than {max_bytes} bytes")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    size, deadline = 0, time.monotonic() + BODY_SECONDS
    async with aclosing(request.stream()) as stream:
        while True:
            patience = min(IDLE_SECONDS, deadline - time.monotonic())
            try:
                async with asyncio.timeout(patience):
                    chunk = await anext(stream, None)
            except TimeoutError as error:
                late = f"the body did not arrive within {BODY_SECONDS} seconds, or nothing of it for {IDLE_SECONDS}"
                raise RequestError(408, late) from error
            if chunk is None:
                return
            size += len(chunk)
            if size > max_bytes:
                raise too_large
            yield chunk


async def unless_left(request: Request, work: Any) -> Any:
    """Await `work`, or cancel it as soon as the client hangs up; for requests whose body has been read."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def busy(message: str) -> RequestError:
    return RequestError(429, message, code="queue_full", headers=RETRY_AFTER)


def _error(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The router's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    refused = RequestError(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}",
        headers=dict(error.headers or {}),
    )
    return _error(refused)


async def _on_bug(request: Request, error: Exception) -> Response:
    return _error(RequestError(500, "the server failed to answer"))


async def _page() -> Response:
    page = files("hovle_serve").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(
        page, headers={"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
    )
