"""Clients that send or read slowly, or send too much: they are hung up on, and cost the others nothing."""

import base64
import contextlib
import json
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from hovle_serve import front, listener

HI = [{"role": "user", "content": "hi"}]


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20)


def head(*more: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_headers_that_do_not_come_are_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr(listener, "HEADER_SECONDS", 0.3)
    server = serve()
    connections = [connect(server) for _ in range(50)]
    for connection in connections:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")
    assert server.post({}).status_code == 200
    for connection in connections:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert connection.recv(1000) == b""
        connection.close()
    # The second request of a connection has no more time than the first; an answer may take what it takes.
    with connect(server) as connection:
        body = json.dumps({"model": server.name, "messages": HI, "max_tokens": 200}).encode()
        connection.sendall(head(f"Content-Length: {len(body)}") + body)
        got = b""
        while b'"usage"' not in got:
            got += connection.recv(65536)
        assert got.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /he")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_bodies_that_do_not_come_are_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr(front, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(front, "MAX_READERS", 4)
    server = serve()
    connections = [connect(server) for _ in range(4)]
    for connection in connections:
        connection.sendall(head("Content-Length: 1000") + b'{"model":')
    until(lambda: server.post({}).status_code == 429)  # as many as may hold a body do
    for connection in connections:
        answer = connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within" in answer
        connection.close()
    assert server.post({}).status_code == 200


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
    before = attack()
    for _ in range(4):
        after = attack()
    assert after - before < 40e6
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
    before = attack()
    with ThreadPoolExecutor(1) as pool:
        hit = pool.submit(server.post, long)
        for _ in range(3):
            after = attack()
    assert hit.result().json()["choices"][0]["message"]["content"] == alone
    assert after - before < 40e6


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
