"""One HTTP face for several models, each of which is answered by replicas elsewhere.

A request goes to a replica whole. What fails with the replica before anything of its answer came is sent to another
one; what fails later ends as an error in the stream.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter
from starlette.types import Message

from hovle_serve.access import Access
from hovle_serve.front import RETRY_AFTER, Front, routes, unless_left
from hovle_serve.protocol import ChatRequest, Limits, RequestError
from hovle_serve.relay import Relayed

logger = logging.getLogger(__name__)

ATTEMPTS = 4
RETRY_SECONDS = 0.2

Messages = AsyncGenerator[list[Message], None]
Replicas = Callable[[Relayed], Messages]


class ReplicaLostError(Exception):
    """The replica that had the request is gone."""


class ReplicasBusyError(Exception):
    """As many requests wait for the replicas of a model as may."""


def create_gateway(models: Mapping[str, Replicas], access: Access, limits: Limits) -> FastAPI:
    """The app that gives a request to `models[its model]`, whose stream of ASGI messages is the answer; that raises
    ReplicaLostError and ReplicasBusyError."""
    return routes(_Gateway(models, access, limits))


class _Gateway(Front):
    relays = True  # to another replica, if the first one is lost

    def __init__(self, models: Mapping[str, Replicas], access: Access, limits: Limits) -> None:
        registry = CollectorRegistry()
        super().__init__(list(models), access, limits, registry)
        self._models = models
        self._retries = Counter(
            "hovle_retries", "Requests sent to another replica", ["model"], registry=registry
        )

    def check_room(self) -> None:
        """Replicas and Ray's queue before them say so themselves."""

    def is_healthy(self) -> bool:
        return True

    async def prepare(self, body: ChatRequest, raw: bytes) -> tuple[str, Relayed]:
        headers = ((b"content-type", b"application/json"),)
        return body.model, Relayed("POST", "/v1/chat/completions", headers, raw)

    async def respond(self, request: Request, prepared: tuple[str, Relayed]) -> Response:
        return await self._relayed(request, *prepared)

    async def metrics(self, request: Request) -> Response:
        """The gateway's own; of `?model=NAME` those of one of its replicas."""
        if (name := request.query_params.get("model")) is None:
            return await super().metrics(request)
        self.authorize(request)
        self._check_model(name)
        return await self._relayed(request, name, Relayed("GET", "/metrics"))

    async def _relayed(self, request: Request, model: str, relayed: Relayed) -> Response:
        first, messages = await unless_left(request, self._begun(model, relayed))
        start = first.pop(0)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
        if headers.get("content-type", "").startswith("text/event-stream"):
            return StreamingResponse(_bodies(first, messages), start["status"], headers)
        async with aclosing(messages):
            body = b"".join([chunk async for chunk in _bodies(first, messages)])
        return Response(body, start["status"], headers)

    async def _begun(self, model: str, relayed: Relayed) -> tuple[list[Message], Messages]:
        """The first messages, from whichever replica gives some, and the rest."""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._retries.labels(model).inc()
                await asyncio.sleep(RETRY_SECONDS * attempt)
            messages = self._models[model](relayed)
            try:
                return await anext(messages), messages
            except ReplicaLostError as error:
                logger.warning("%s: a replica was lost before it answered: %s", model, error)
            except ReplicasBusyError as error:
                raise RequestError(503, f"{model} is overloaded", headers=RETRY_AFTER) from error
        raise RequestError(503, f"{model} has no replica that answers", headers=RETRY_AFTER)


async def _bodies(first: list[Message], rest: Messages) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        try:
            yield b"".join(message.get("body", b"") for message in first)
            async for messages in rest:
                yield b"".join(message.get("body", b"") for message in messages)
        except ReplicaLostError:
            logger.warning("a replica was lost in the middle of an answer")
            error = RequestError(503, "the replica that answered was lost", headers=RETRY_AFTER)
            yield b"data: " + json.dumps(error.body).encode() + b"\n\n"
