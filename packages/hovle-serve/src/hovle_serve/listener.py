"""The HTTP server of one machine: uvicorn, which waits for nobody for ever."""

import asyncio
import ipaddress
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hovle_serve import front
from hovle_serve.protocol import RequestError

HEADER_SECONDS = 20.0
DRAIN_SECONDS = 30  # a stopped server finishes what it answers, for so long
FAREWELL_SECONDS = 2  # for those who still wait to be told, and for what of this to be sent


class PunctualProtocol(H11Protocol):
    """Hangs up with 408 on who takes HEADER_SECONDS to send a request's headers; h11 bounds their size. And on who
    takes nothing of an answer for WRITE_SECONDS: uvicorn's own way to close waits until the rest has been taken."""

    _timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # tells of any rest, however small
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None:  # the start of the next request
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def _watch(self, unread: int) -> None:
        self._unread_timer = self.loop.call_later(front.WRITE_SECONDS, self._give_up, unread)

    def _stop_watching(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _give_up(self, unread: int) -> None:
        """Unless something was taken of the `unread` bytes; nothing is added while writing is paused."""
        if (left := self.transport.get_write_buffer_size()) < unread:
            self._watch(left)
        else:
            self.transport.abort()

    def _wait_for_headers(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(
            b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        self.transport.close()


class LocalNames:
    """Lets in only requests that name this machine as their Host. A site whose name is made to resolve to 127.0.0.1
    (DNS rebinding) is then not taken for the server's own page by a visitor's browser."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] != "http" or _is_local(host):
            await self.app(scope, receive, send)
            return
        message = f"Host {host!r} is not this machine; give the server an --api-key-file to use it under other names"
        refused = RequestError(403, message)
        await JSONResponse(refused.body, refused.status)(scope, receive, send)


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return f".{name}".endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:  # another name, or none at all, as "[" is
        return False


class LastWords:
    """Tells with 503 who is cancelled before anything was answered, as those whose body still arrives when the server
    ends. uvicorn's own word would be a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_begun = False

        async def begun(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self.app(scope, receive, begun)
        except asyncio.CancelledError:
            if scope["type"] != "http" or is_begun:
                raise
            stopped = RequestError(503, "the server is shutting down", headers=front.RETRY_AFTER)
            await JSONResponse(stopped.body, stopped.status, stopped.headers)(scope, receive, send)


class PatientServer(uvicorn.Server):
    """Waits DRAIN_SECONDS for what it answers and then ends the app, which tells those who still wait. uvicorn's own
    way is to cancel them first; so it does with who has not been told FAREWELL_SECONDS later."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for one in self.servers:
            one.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._is_answering() and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        if self._is_answering():
            await self.lifespan.shutdown()  # a second one, uvicorn's, does nothing
        deadline = time.monotonic() + FAREWELL_SECONDS
        while (
            self._is_answering() and self.force_exit and time.monotonic() < deadline
        ):  # uvicorn would not wait
            await asyncio.sleep(0.1)
        await super().shutdown(sockets)

    def _is_answering(self) -> bool:
        return bool(self.server_state.connections or self.server_state.tasks)


def server(app: ASGIApp, log_level: str = "warning") -> uvicorn.Server:
    """To be run with the sockets it shall listen on."""
    return PatientServer(
        uvicorn.Config(
            LastWords(app),
            http=PunctualProtocol,
            ws="none",
            log_level=log_level,
            timeout_graceful_shutdown=FAREWELL_SECONDS,
            server_header=False,
        )
    )
