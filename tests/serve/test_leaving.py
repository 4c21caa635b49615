"""Who hangs up, who comes when all places are taken, and what fails in the middle of a stream."""

import contextlib
import json
import re
import socket
import threading
import time

import openai
import pytest
from asking import HI, NAME, ask, until


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_frees_the_place(serve, model, stream):
    server = serve(max_batch=1)
    model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    body = json.dumps({"model": NAME, "messages": HI, "max_tokens": 450, "stream": stream}).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    port = int(server.url.rpartition(":")[2])
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + body)
            until(lambda: server.engine.num_active == 1)
        until(lambda: server.engine.num_active == 0)
    assert server.engine.steps < 3 * 440
    with contextlib.closing(ask(server.client(), stream=True, max_tokens=450)) as events:
        next(iter(events))
        waiting = threading.Thread(target=server.post, args=({},))
        waiting.start()
        until(lambda: server.engine.num_waiting == 1)
    waiting.join(timeout=30)
    assert not waiting.is_alive()


@pytest.mark.parametrize("stream", [True, False])
def test_the_tokens_of_those_who_hang_up_are_counted_once(serve, model, stream):
    server = serve()
    model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    prompt = server.post({}).json()["usage"]["prompt_tokens"]

    def counted(name: str) -> float:
        return float(
            re.search(rf"^hovle_{name}_tokens_total (\S+)", server.http.get("/metrics").text, re.M)[1]
        )

    assert (counted("prompt"), counted("completion")) == (prompt, 4)
    body = json.dumps({"model": NAME, "messages": HI, "max_tokens": 450, "n": 2, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        steps = server.engine.steps
        until(lambda: server.engine.steps > steps + 5)
    until(lambda: server.engine.num_active == 0 and counted("completion") > 4)
    assert counted("prompt") == 2 * prompt
    assert 4 + 2 * 3 <= counted("completion") < 4 + 2 * 440
    settled = counted("completion")
    time.sleep(0.1)
    assert counted("completion") == settled


def test_a_full_queue_says_when_to_come_back(serve, model):
    server = serve(max_batch=1, max_queue=1)
    model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    stream = ask(server.client(), stream=True, max_tokens=450)
    next(iter(stream))
    waiting = threading.Thread(target=server.post, args=({},))
    waiting.start()
    until(lambda: server.engine.num_waiting == 1)
    with pytest.raises(openai.RateLimitError) as error:
        ask(server.client())
    assert error.value.response.headers["Retry-After"] == "1"
    assert error.value.code == "queue_full"
    assert server.post({"n": 2}).status_code == 429
    stream.close()
    waiting.join(timeout=30)
    until(lambda: server.engine.num_active == server.engine.num_waiting == 0)
    assert server.post({"n": 2}).json()["error"]["param"] == "n"  # would never fit


def test_a_failure_in_the_middle_of_a_stream_is_an_event_and_before_it_a_status(serve, model):
    server = serve()
    model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    stream = iter(ask(server.client(), stream=True, max_tokens=450))
    next(stream)
    handle = model.language_model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(openai.APIError, match="the answer failed"):
        list(stream)
    with pytest.raises(openai.InternalServerError) as error:
        ask(server.client(), stream=True)
    assert error.value.body["message"] == "the server failed to answer"
    handle.remove()
    assert ask(server.client()).choices[0].message.content
