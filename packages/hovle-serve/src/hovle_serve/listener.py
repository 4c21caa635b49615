"""The HTTP server of one machine: uvicorn, which waits for nobody for ever."""

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0
DRAIN_SECONDS = 30  # a stopped server finishes what it answers, for so long


class PunctualProtocol(H11Protocol):
    """Hangs up with 408 on who takes HEADER_SECONDS to send a request's headers; h11 bounds their size."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None:  # the start of the next request
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        self.transport.write(
            b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        self.transport.close()


def server(app: FastAPI, log_level: str = "warning") -> uvicorn.Server:
    """To be run with the sockets it shall listen on."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=PunctualProtocol,
            log_level=log_level,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            server_header=False,
        )
    )
