"""The HTTP face of one engine: OpenAI's chat completions, health, metrics, and the page at `/`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from hovle_serve.access import Access
from hovle_serve.completions import Completion, answer
from hovle_serve.engine import Engine, EngineClosedError, QueueFullError
from hovle_serve.front import RETRY_AFTER, Front, busy, routes
from hovle_serve.media import MediaFetcher
from hovle_serve.metrics import Metrics
from hovle_serve.prompts import Fetched, Prompt, PromptEncoder, has_links, has_pictures, is_long
from hovle_serve.protocol import ChatRequest, Limits, RequestError
from hovle_serve.sampling import Sampling

DEFAULT_MAX_TOKENS = 512
MAX_DECODERS = 2  # requests whose pictures are decoded at a time
MAX_FETCHERS = 8  # requests that fetch pictures or hold fetched ones; a slow host keeps no decoder
MAX_LONG = 32  # requests with long texts, of which one is tokenised at a time
MAX_PICTURED = 64  # requests with pictures being prepared or waiting: the rest of MAX_PREPARED is text's


def create_app(
    engine: Engine,
    name: str,
    access: Access | None = None,
    limits: Limits | None = None,
    media: MediaFetcher | None = None,
) -> FastAPI:
    """The app that serves `engine` as model `name`, and closes it at its shutdown.

    access: whose keys have to come as `Authorization: Bearer`, but for `/`, `/health` and `/openapi.json`; None means
        everybody.
    media: fetches pictures that are given by URL; without one they are refused.
    """
    service = _Service(engine, name, access or Access(), limits or Limits(), media)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = routes(service, lifespan)
    app.state.engine = engine
    return app


@dataclass(frozen=True)
class _Prepared:
    body: ChatRequest  # without its messages, which may hold megabytes of pictures
    prompt: Prompt


class _Service(Front):
    def __init__(
        self, engine: Engine, name: str, access: Access, limits: Limits, media: MediaFetcher | None
    ) -> None:
        self.engine, self._metrics, self._media = engine, Metrics(engine), media
        self._prompts = PromptEncoder(engine.processor, limits)
        self._decoders, self._fetchers = asyncio.Semaphore(MAX_DECODERS), asyncio.Semaphore(MAX_FETCHERS)
        self._turn_of_long = asyncio.Semaphore(1)
        self._num_pictured = self._num_long = 0
        super().__init__([name], access, limits, self._metrics.registry)

    def check_room(self) -> None:
        if not self.engine.has_room():
            raise busy("too many requests wait already")

    def is_healthy(self) -> bool:
        return self.engine.is_running

    async def prepare(self, body: ChatRequest, raw: bytes) -> _Prepared:
        async with self._turn(body):
            prompt = await (self._pictured(body) if has_pictures(body) else self._encoded(body, {}))
        return _Prepared(body.model_copy(update={"messages": []}), prompt)

    @asynccontextmanager
    async def _turn(self, body: ChatRequest) -> AsyncIterator[None]:
        """Long texts take turns: the threads that requests are prepared in are few, and would all wait for them."""
        if not is_long(body):
            yield
            return
        if self._num_long >= MAX_LONG:
            raise busy("too many long texts are being read")
        self._num_long += 1
        try:
            async with self._turn_of_long:
                yield
        finally:
            self._num_long -= 1

    async def _pictured(self, body: ChatRequest) -> Prompt:
        if self._num_pictured >= MAX_PICTURED or not self.engine.has_room(tile_bytes=1):
            raise busy("too many requests with pictures wait already")
        self._num_pictured += 1
        try:
            if self._media is None or not has_links(body):
                return await self._decoded(body, {})
            async with self._fetchers:
                return await self._decoded(body, await self._prompts.fetch(body, self._media))
        finally:
            self._num_pictured -= 1

    async def _decoded(self, body: ChatRequest, fetched: Fetched) -> Prompt:
        async with self._decoders:
            return await self._encoded(body, fetched)

    async def _encoded(self, body: ChatRequest, fetched: Fetched) -> Prompt:
        """A thread goes on when nobody waits for it: who is cancelled waits, and holds decoder and bytes till then."""
        work = asyncio.ensure_future(asyncio.to_thread(self._prompts.encode, body, fetched))
        try:
            return await asyncio.shield(work)
        finally:
            await asyncio.wait({work})

    async def respond(self, request: Request, prepared: _Prepared) -> Response:
        body, prompt = prepared.body, prepared.prompt.encoded
        samplings = self._samplings(body, prepared.prompt)
        completion = Completion(
            self.names[0],
            self.engine.tokenizer,
            len(prompt.input_ids),
            int((prompt.input_ids == self.engine.processor.image_token_id).sum()),
            prepared.prompt.pictures,
            len(samplings),
        )
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        events = answer(self.engine, self._metrics, request, prompt, samplings, body.stop, top_logprobs)
        del prompt, prepared  # the engine drops its tiles as soon as they are read
        try:
            if not body.stream:
                return JSONResponse(await completion.whole(events))
            # What goes wrong before the first text still gets a status of its own.
            first = await anext(events)
        except QueueFullError as error:
            raise busy(str(error)) from error
        except EngineClosedError as error:
            raise RequestError(503, str(error), headers=RETRY_AFTER) from error
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return StreamingResponse(
            completion.stream(first, events, usage, _failure),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    def _samplings(self, body: ChatRequest, prompt: Prompt) -> list[Sampling]:
        """How to draw each of the n answers; the seeds of the others follow the first's."""
        n = body.n or 1
        if n > self.engine.max_queue:
            raise RequestError(
                400, f"n: {n} is more than the {self.engine.max_queue} that the queue holds", "n"
            )
        try:  # an upper bound, as in hovle chat
            limit = min(body.limit or DEFAULT_MAX_TOKENS, self.engine.room(prompt.encoded))
        except ValueError as error:
            raise RequestError(400, str(error), "messages", "context_length_exceeded") from error
        temperature = 1.0 if body.temperature is None else body.temperature
        return [
            Sampling(limit, temperature, body.top_p or 1.0, None if body.seed is None else body.seed + i)
            for i in range(n)
        ]


def _failure(error: Exception) -> dict[str, Any]:
    """What a client is told of an exception in the middle of a stream: of a bug, only that there was one."""
    stopped = isinstance(error, EngineClosedError)
    return RequestError(503 if stopped else 500, str(error) if stopped else "the answer failed").body
