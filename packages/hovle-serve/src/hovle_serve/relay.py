"""An HTTP request whose body has come whole, given to an ASGI app in another process, and what the app sends back."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True)
class Relayed:
    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""

    def scope(self) -> Scope:
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": self.method, "scheme": "http", "path": self.path, "raw_path": self.path.encode(),
            "query_string": b"", "root_path": "", "headers": list(self.headers), "client": None, "server": None,
            "state": {},
        }  # fmt: skip


async def answered(app: ASGIApp, request: Relayed) -> AsyncGenerator[list[Message], None]:
    """The app's messages as they come, together what came together. Closing it hangs up on the app and waits for it.

    Raises what the app raised.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    is_read, gone = False, asyncio.Event()

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            await gone.wait()
            return {"type": "http.disconnect"}
        is_read = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        messages.put_nowait(message)  # no more than one answer, which is bounded by its tokens

    task = asyncio.ensure_future(app(request.scope(), receive, send))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            together = [message]
            while not messages.empty() and (message := messages.get_nowait()) is not None:
                together.append(message)
            yield together
            if message is None:
                break
        await task
    finally:
        gone.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
