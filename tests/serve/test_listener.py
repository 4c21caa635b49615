"""Clients that send or read slowly, or send too much: they are hung up on, and cost the others nothing."""

import asyncio
import base64
import contextlib
import gc
import io
import json
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import httpx
import psutil
import pytest
from asking import HI, until
from PIL import Image

from hovle_serve import api, front, listener
from hovle_serve.protocol import Limits


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20)


def head(*more: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def read_until(connection: socket.socket, text: bytes) -> bytes:
    """What has come once `text` has: head and body are written apart, and may be read apart."""
    got = b""
    while text not in got and (piece := connection.recv(65536)):
        got += piece
    assert text in got, got
    return got


def test_headers_that_do_not_come_are_not_waited_for(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(listener, "HEADER_SECONDS", 0.3)
    connections = [connect(server) for _ in range(50)]
    for connection in connections:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")
    until(lambda: len(server._server.server_state.connections) == 50)
    monkeypatch.undo()  # who comes from here on has time
    assert server.post({}).status_code == 200
    for connection in connections:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert connection.recv(1000) == b""
        connection.close()
    # The second request of a connection has no more time than the first; an answer may take what it takes.
    with connect(server) as connection:
        body = json.dumps({"model": server.name, "messages": HI, "max_tokens": 200}).encode()
        connection.sendall(head(f"Content-Length: {len(body)}") + body)
        assert read_until(connection, b'"usage"').startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(listener, "HEADER_SECONDS", 0.3)
        connection.sendall(b"GET /he")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("limit", ["BODY_SECONDS", "IDLE_SECONDS"])
def test_bodies_that_do_not_come_are_not_waited_for(serve, monkeypatch, limit):
    monkeypatch.setattr(front, limit, 4)  # the one that is answered has no longer
    server = serve()
    connections = [connect(server) for _ in range(100)]
    for connection in connections:
        connection.sendall(head("Content-Length: 1000") + b'{"model":')
    assert server.post({}).status_code == 200  # they hold next to nothing, and nobody up
    for connection in connections:
        assert read_until(connection, b"did not arrive within").startswith(b"HTTP/1.1 408")
        connection.close()


def test_large_bodies_that_come_slowly_hold_no_more_than_their_share(serve, monkeypatch):
    monkeypatch.setattr(front, "MAX_BODIES", 1)
    server = serve(limits=Limits(max_body_bytes=100_000))
    connections = [connect(server) for _ in range(2)]
    for connection in connections:
        connection.sendall(head("Content-Length: 90000") + b" " * 80_000)
    refused = [select.select(connections, [], [], 20)[0][0].recv(10_000)]
    assert refused[0].startswith(b"HTTP/1.1 429")
    for connection in connections:
        connection.close()
    until(lambda: server.post({}).status_code == 200)


def test_no_more_than_so_many_are_prepared_at_a_time(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(front, "MAX_PREPARED", 0)
    assert server.post({}).status_code == 429
    monkeypatch.setattr(front, "MAX_PREPARED", 1)
    assert [server.post({}).status_code for _ in range(3)] == [200, 200, 200]


def test_a_body_that_says_it_is_too_large_is_not_read(serve):
    with connect(serve()) as connection:
        connection.sendall(head("Content-Length: 99999999999"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_compressed_body_is_refused_by_name(serve):
    with connect(serve()) as connection:
        connection.sendall(head("Content-Encoding: gzip", "Content-Length: 2") + b"{}")
        assert read_until(connection, b"gzip").startswith(b"HTTP/1.1 415")


def test_a_socket_is_not_upgraded_and_left_alone(serve, monkeypatch, caplog):
    monkeypatch.setattr(listener, "HEADER_SECONDS", 1.5)
    with connect(serve()) as connection:
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"
        connection.sendall(f"GET /health HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(2)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:80", 200), ("evil.example", 403), ("", 403),
     ("127.0.0.1.evil", 403), ("evillocalhost", 403), ("[", 403), ("[foo]", 403), ("[::1", 403)],
)  # fmt: skip
def test_a_keyless_server_on_this_machine_answers_to_its_own_names(serve, host, status):
    """Or a site that resolves to 127.0.0.1 would be the server's own page to a visitor's browser."""
    app = listener.LocalNames(serve().app)

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.get("/health", headers={"Host": host})).status_code

    assert asyncio.run(ask()) == status


def test_who_does_not_read_is_given_up_and_frees_its_place(serve, monkeypatch):
    monkeypatch.setattr(front, "WRITE_SECONDS", 0.3)
    server = serve(max_batch=4)
    # Answers of 8 x 440 tokens with 20 logprobs each: far more than all buffers on the way hold.
    body = json.dumps(
        {"model": server.name, "messages": HI, "max_tokens": 440, "n": 8, "logprobs": True, "top_logprobs": 20,
         "stream": True}
    ).encode()  # fmt: skip
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.sendall(head(f"Content-Length: {len(body)}") + body)
    until(lambda: server.engine.num_active == 4)
    assert server.post({}).status_code == 200  # behind it in the queue
    until(lambda: server.engine.num_active == server.engine.num_waiting == 0)
    got = b""
    connection.settimeout(20)
    while piece := connection.recv(1 << 20):
        got += piece
    connection.close()
    assert got.startswith(b"HTTP/1.1 200")
    assert b"data: [DONE]" not in got


def slowed(server) -> None:
    """Answers of 400 tokens take far longer than any test waits."""
    server.engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_who_is_not_answered_before_a_stopped_server_ends_hears_so(serve, monkeypatch, seconds):
    monkeypatch.setattr(listener, "DRAIN_SECONDS", seconds)
    monkeypatch.setattr(listener, "FAREWELL_SECONDS", 20)  # nobody needs it
    server = serve(max_batch=2)
    slowed(server)
    streamed, long = threading.Event(), {"max_tokens": 400}

    def stream() -> str:
        body = {"model": server.name, "messages": HI, "stream": True, **long}
        with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            streamed.set()
            return "\n".join([first, *lines])  # raises unless the stream has a proper end

    with ThreadPoolExecutor(4) as pool:
        begun = pool.submit(stream)
        assert streamed.wait(30)
        refused = [pool.submit(server.post, long)]
        until(lambda: server.engine.num_active == 2)
        refused += [pool.submit(server.post, long | {"stream": is_stream}) for is_stream in (False, True)]
        until(lambda: server.engine.num_waiting == 2)
        server._server.should_exit = True
        *_, event, _ = begun.result().split("\n")
        answers = [one.result() for one in refused]
    assert json.loads(event.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
    for answer in answers:
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert answer.json()["error"]["message"] == "the server is shutting down"


def test_a_stopped_server_answers_what_ends_within_its_drain(serve):
    server = serve()
    alone = server.post({"max_tokens": 8}).json()["choices"]
    slowed(server)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, {"max_tokens": 8})
        until(lambda: server.engine.num_active)
        server._server.should_exit = True
        assert answer.result().json()["choices"] == alone


def test_who_still_sends_when_a_stopped_server_ends_hears_so(serve, monkeypatch):
    monkeypatch.setattr(listener, "DRAIN_SECONDS", 0)
    monkeypatch.setattr(listener, "FAREWELL_SECONDS", 0.1)
    server = serve()
    with connect(server) as connection:
        connection.sendall(head("Content-Length: 1000") + b'{"model":')
        until(lambda: server._server.server_state.tasks)
        server._server.should_exit = True
        answer = read_until(connection, b"the server is shutting down").lower()
    assert answer.startswith(b"http/1.1 503")
    assert b"retry-after" in answer


@contextlib.contextmanager
def serving(app):
    """Where `app` is, behind a listener of its own."""
    server, opened = listener.server(app, log_level="critical"), socket.create_server(("127.0.0.1", 0))
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    until(lambda: server.started)
    try:
        yield opened.getsockname()
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("size", "count"), [(2**25, 1), (60_000, 1), (2**16, 500)], ids=["whole", "small", "stream"]
)
def test_who_never_reads_leaves_nothing_behind(monkeypatch, size, count):
    """Neither a socket nor what was to be sent on it, which is no longer the app's then."""
    monkeypatch.setattr(front, "WRITE_SECONDS", 0.5)
    asked = []

    async def app(scope, receive, send) -> None:
        if scope["type"] == "http":
            asked.append(scope)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for left in reversed(range(count)):
                await send({"type": "http.response.body", "body": b"a" * size, "more_body": left > 0})

    process = psutil.Process()
    with serving(app) as address, contextlib.ExitStack() as clients:
        gc.collect()  # an earlier test's client may hold some
        before = process.num_fds()
        for _ in range(10):
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address)
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: len(asked) == 10)
        until(lambda: process.num_fds() == before + 10)  # the clients' own


def test_who_reads_slowly_is_given_up_only_when_nothing_was_taken():
    protocol = listener.PunctualProtocol.__new__(listener.PunctualProtocol)
    protocol.flow, protocol.loop, protocol.transport = Mock(), Mock(), Mock()
    protocol.transport.get_write_buffer_size.side_effect = [100, 60, 59, 59]
    protocol.pause_writing()
    for _ in range(3):
        protocol.transport.abort.assert_not_called()
        seconds, give_up, unread = protocol.loop.call_later.call_args.args
        assert seconds == front.WRITE_SECONDS
        give_up(unread)
    protocol.transport.abort.assert_called_once()
    assert protocol.loop.call_later.call_count == 3
    protocol.resume_writing()
    protocol.loop.call_later.return_value.cancel.assert_called_once()


def growth(memory: list[int]) -> int:
    """Bytes that nine looks at memory grew by, from the first three to the next and from these to the last: the less of
    both. What leaks grows each time; a buffer or an arena that comes to stay does so once, whenever that is."""
    early, middle, late = memory[:3], memory[3:6], memory[6:]
    return min(min(middle) - max(early), min(late) - max(middle))


def test_huge_headers_and_bodies_leave_memory_flat(serve):
    server, process = serve(), psutil.Process()
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}] * 10_000

    def attack() -> int:
        for _ in range(3):
            with (
                connect(server) as connection,
                contextlib.suppress(OSError),
            ):  # hung up on before all was sent
                connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * 8_000_000)
                assert connection.recv(1000)[:12] in (b"HTTP/1.1 400", b"")
        assert server.post(b" " * 40_000_000).status_code == 413
        refused = server.post({"messages": [{"role": "user", "content": parts}]})
        assert "10000 pictures, at most 32" in refused.json()["error"]["message"]
        return process.memory_info().rss

    attack()  # the client is in this process too, and its buffers come to stay
    memory = [attack() for _ in range(9)]  # a buffer of some 60 MB is there or not when it is looked at
    assert growth(memory) < 10e6
    assert server.post({}).status_code == 200


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A picture that says how large it is, and holds next to nothing."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), *more, (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def test_bombs_leave_memory_flat_and_an_answer_in_work_as_it_is(serve):
    server, process = serve(), psutil.Process()
    swollen = zlib.compress(b"\0" * 100_000_000, 9)
    bombs = {
        "pixels": png(60_000, 60_000),
        "a gif's pixels": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"\0" * 100,
        "text": png(60, 60, (b"zTXt", b"a\0\0" + swollen)),
        "a profile": png(60, 60, (b"iCCP", b"a\0\0" + swollen)),
        "rows that do not come": png(4_000, 4_000),
        "a tiff's directory": b"II*\0" + struct.pack("<I", 8) + b"\xff" * 4_000,
    }

    def attack() -> int:
        for name, data in bombs.items():
            url = "data:image/png;base64," + base64.b64encode(data).decode()
            answer = server.post(
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
                    ]
                }
            )
            assert answer.status_code == 400, (name, answer.text)
            assert answer.json()["error"]["code"] == "invalid_image"
        return process.memory_info().rss

    long = {"messages": [{"role": "user", "content": "what?"}], "max_tokens": 400}
    alone = server.post(long).json()["choices"][0]["message"]["content"]
    attack()
    with ThreadPoolExecutor(1) as pool:
        hit = pool.submit(server.post, long)
        memory = [attack() for _ in range(9)]  # a picture of 64 MB may not be collected yet
    assert hit.result().json()["choices"][0]["message"]["content"] == alone
    assert growth(memory) < 10e6


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "P"])
def test_a_large_picture_costs_little_more_than_its_pixels(mode):
    """It may be small as a file."""
    file = io.BytesIO()
    Image.new(mode, (7_000, 7_000)).save(file, "PNG", compress_level=1)
    code = (
        "import re, sys; from hovle_core.images import decode_image; data = sys.stdin.buffer.read();"
        # not ru_maxrss, which begins at the parent's
        r"peak = lambda: int(re.search(r'VmHWM:\s*(\d+)', open('/proc/self/status').read())[1]); before = peak();"
        "decode_image(data); print((peak() - before) / 1024)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], input=file.getvalue(), capture_output=True, check=True
    )
    # The file's pixels and RGB, four bytes each; and the picture has been there whole, or nothing was measured.
    assert 3 * 49_000_000 / 2**20 < float(found.stdout) < 2.6 * 4 * 49_000_000 / 2**20


def test_text_does_not_wait_for_pictures(serve, monkeypatch):
    monkeypatch.setattr(api, "MAX_DECODERS", 0)
    assert serve().post({}).status_code == 200


def test_a_body_without_a_length_is_not_read_for_ever(serve):
    def endless():
        for _ in range(40_000_000 // 2**16):
            yield b" " * 2**16

    server = serve()
    assert server.post(endless()).status_code == 413
    assert server.post({}).status_code == 200


@pytest.mark.parametrize("tail", [b"", b"GIF89a;<script>", b"PK\x03\x04"])
def test_a_polyglot_file_is_the_picture_it_begins_as(serve, picture, tail):
    url = "data:text/html;base64," + base64.b64encode(picture.read_bytes() + tail).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    answer = serve().post({"messages": [{"role": "user", "content": parts}]})
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 4
