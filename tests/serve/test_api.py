"""The API over a real socket: the openai client, curl, and whatever else people send."""

import asyncio
import base64
import contextlib
import io
import json
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hovle_serve.answer import Piece, TokenLogprob
from hovle_serve.chat import ChatSession
from hovle_serve.completions import Completion
from hovle_serve.protocol import Limits, RequestError, parse_request
from hovle_serve.sampling import Sampling

NAME = "tiny/hovle"
HI = [{"role": "user", "content": "hi"}]


def data_uri(size=(80, 60), colour="red") -> str:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def with_pictures(text: str, *urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ask(client: openai.OpenAI, messages=HI, **fields):
    return client.chat.completions.create(
        model=NAME, messages=messages, **{"max_tokens": 12, "temperature": 0} | fields
    )


# ---- what is answered ------------------------------------------------------------------------------------------------


def test_the_openai_client_hears_what_hovle_chat_says(serve, model, processor):
    client = serve().client()
    session = ChatSession(model, processor, system="be brief", sampling=Sampling(max_new_tokens=12))
    images = [Image.new("RGB", (80, 60), "red"), Image.new("RGB", (300, 60), "blue")]
    expected = ["".join(session.ask("what is this?", images)), "".join(session.ask("and now?"))]

    messages = [{"role": "system", "content": "be brief"}]
    messages += with_pictures("what is this?", data_uri(), data_uri((300, 60), "blue"))
    first = ask(client, messages)
    choice = first.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        expected[0],
        "length",
    )
    prompt = processor.encode(session.messages[:2], images, add_generation_prompt=True)
    assert first.usage.prompt_tokens == len(prompt.input_ids)
    assert (first.usage.completion_tokens, first.usage.total_tokens) == (12, len(prompt.input_ids) + 12)
    assert first.usage.prompt_tokens_details.image_tokens == 4 * len(prompt.tiles)
    assert (first.object, first.model) == ("chat.completion", NAME)
    assert choice.logprobs is None

    messages += [
        choice.message,
        {"role": "user", "content": "and now?"},
    ]  # the client's own object goes back in
    assert ask(client, messages).choices[0].message.content == expected[1]
    messages[-2] = choice.message.model_dump()  # null wherever OpenAI's have something
    assert ask(client, messages).choices[0].message.content == expected[1]


def test_a_picture_of_low_detail_is_one_tile(serve, model, processor):
    picture = data_uri((300, 60), "blue")
    [message] = with_pictures("what is this?", picture, picture)
    message["content"][1]["image_url"]["detail"] = "low"
    answer = ask(serve().client(), [message])
    wide = Image.new("RGB", (300, 60), "blue")
    tiles = [processor.tiles(wide), processor.image_processor.tiles(wide, (1, 1))]
    assert [len(t) for t in tiles] == [5, 1]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is this?"}]
    prompt = processor.encode([{"role": "user", "content": parts}], tiles, add_generation_prompt=True)
    assert answer.usage.prompt_tokens == len(prompt.input_ids)
    shapes = [(p["columns"], p["rows"], p["thumbnail"]) for p in answer.usage.prompt_tokens_details.images]
    assert shapes == [(4, 1, True), (1, 1, False)]
    inputs = processor.batch([prompt])
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.choices[0].message.content == processor.tokenizer.decode(new, skip_special_tokens=True)


def test_openais_other_fields_are_taken_where_they_ask_for_nothing(serve):
    client = serve().client()
    expected = ask(client).choices[0].message.content
    null = dict.fromkeys((
        "audio", "function_call", "functions", "logit_bias", "metadata", "modalities", "moderation",
        "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "reasoning_effort", "response_format", "safety_identifier", "service_tier", "store", "tool_choice", "tools",
        "verbosity", "web_search_options", "frequency_penalty", "presence_penalty", "user", "stop", "n",
    ))  # fmt: skip
    default = {
        "function_call": "none", "functions": [], "logit_bias": {}, "metadata": {}, "modalities": ["text"],
        "parallel_tool_calls": True, "prompt_cache_key": "a", "reasoning_effort": "medium",
        "response_format": {"type": "text"}, "safety_identifier": "a", "service_tier": "auto", "store": False,
        "tool_choice": "auto", "tools": [], "verbosity": "medium",
    }  # fmt: skip
    for fields in (null, default):
        assert ask(client, extra_body=fields).choices[0].message.content == expected
    messages = [
        HI[0] | {"name": None},
        {"role": "assistant", "content": "a", "tool_calls": [], "annotations": []},
    ]
    assert ask(client, [*messages, *HI], stream=True, stream_options={"include_obfuscation": False})


def test_models(serve):
    client = serve().client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "hovle"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.3, "top_p": 0.9, "seed": 5, "n": 3},
        {"logprobs": True, "top_logprobs": 2, "n": 2},
        {"stop": ["e", "~~"], "temperature": 1.3, "seed": 1, "max_tokens": 60},
    ],
    ids=["greedy", "n seeds", "logprobs", "stop"],
)
def test_a_stream_is_the_same_answer(serve, fields):
    client = serve().client()
    messages = with_pictures("what is this?", data_uri())
    whole = ask(client, messages, **fields)
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}, **fields))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.delta.role for c in mine] == ["assistant", *[None] * (len(mine) - 1)]
        assert [c.finish_reason for c in mine] == [*[None] * (len(mine) - 1), choice.finish_reason]
        tokens = [token for c in mine if c.logprobs for token in c.logprobs.content]
        assert [token.token for token in tokens] == [
            t.token for t in (choice.logprobs.content if choice.logprobs else [])
        ]
        if choice.logprobs:
            assert "".join(token.token for token in tokens) == choice.message.content
            for token, same in zip(tokens, choice.logprobs.content, strict=True):
                assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
                assert len(token.top_logprobs) == 2
                assert bytes(token.bytes).decode() == token.token
    if "stop" in fields:
        assert whole.choices[0].finish_reason == "stop"
        assert "e" not in whole.choices[0].message.content
    if "seed" in fields and "n" in fields:
        assert len({choice.message.content for choice in whole.choices}) == 3
        alone = ask(client, messages, **fields | {"n": 1, "seed": 6})
        assert alone.choices[0].message.content == whole.choices[1].message.content


def test_a_token_is_spelled_once_however_often_it_is_likely():
    """A whole answer may list hundreds of thousands, and the event loop is everybody's."""
    decode = Mock(side_effect=lambda ids, **_: "".join("\ufffd" if i == 3 else f"<{i}>" for i in ids))
    tokenizer = Mock(decode=decode, convert_ids_to_tokens=Mock(side_effect="abc d".__getitem__))
    tokens = [TokenLogprob(i % 5, -1.0, ((i % 5, -1.0), (3, float("-inf")))) for i in range(1000)]

    async def pieces():
        for i, token in enumerate(tokens):
            yield 0, Piece("a", (token,), i + 1, "length" if i == 999 else None)

    completion = Completion("tiny", tokenizer, 1, 0, (), 1)
    content = asyncio.run(completion.whole(pieces()))["choices"][0]["logprobs"]["content"]
    spelled = sorted(call.args[0] for call in tokenizer.convert_ids_to_tokens.call_args_list)
    assert spelled == [0, 0, 1, 2, 3, 3, 4]  # once more as the first, where a tokenizer drops a space
    assert len(content) == 1000
    assert content[6] == {
        "token": "<1>", "logprob": -1.0, "bytes": list(b"<1>"),
        "top_logprobs": [
            {"token": "<1>", "logprob": -1.0, "bytes": list(b"<1>")},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": None},
        ],
    }  # fmt: skip


def test_many_at_once_each_hear_their_own_answer(serve):
    server = serve(max_batch=4)
    questions = [with_pictures("word " * i, *[data_uri((60 * i, 60))] * (i % 3)) for i in range(1, 9)]

    def answer(i: int) -> str:
        response = ask(server.client(), questions[i], temperature=0 if i == 3 else 1.3, seed=i)
        return response.choices[0].message.content

    alone = [answer(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, range(8)))
    assert together == alone
    assert len(set(alone)) == 8


def test_a_system_message_and_a_picture_are_read_once(serve):
    server = serve()
    system = [{"role": "system", "content": "be brief " * 9}]
    wide = data_uri((300, 60))  # 5 tiles of 4 tokens
    for i, question in enumerate(("what is this?", "and what colour has it?")):
        usage = ask(server.client(), [*system, *with_pictures(question, wide)]).usage
        reused = float(
            re.search(r"^hovle_reused_prompt_tokens (\S+)", server.http.get("/metrics").text, re.M)[1]
        )
        assert usage.prompt_tokens_details.image_tokens == 20
        assert (20 + 9 < reused < usage.prompt_tokens) if i else reused == 0


def test_curl(serve, tmp_path):
    assert shutil.which("curl")
    server = serve()
    body = {"model": NAME, "messages": HI, "max_tokens": 3, "temperature": 0}
    expected = server.post(body | {"max_tokens": 3}).json()["choices"][0]["message"]["content"]
    command = ["curl", "-sSN", "--noproxy", "*", f"{server.url}/v1/chat/completions", "-H",
               "Content-Type: application/json", "-d", json.dumps(body | {"stream": True})]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    events = [event.removeprefix("data: ") for event in out.strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == expected


def test_health_and_metrics(serve):
    server = serve()
    assert server.http.get("/health").json() == {"status": "ok"}
    server.post({"max_tokens": 5})
    server.post(b"{")
    until(lambda: server.engine.num_active == 0)  # which is after the last token went out
    text = server.http.get("/metrics").text
    for line in (
        'hovle_responses_total{status="200"} 1.0',
        'hovle_responses_total{status="400"} 1.0',
        "hovle_completion_tokens_total 5.0",
        "hovle_time_to_first_token_seconds_count 1.0",
        "hovle_time_between_tokens_seconds_count 4.0",
        "hovle_active_requests 0.0",
        "hovle_waiting_requests 0.0",
    ):
        assert line in text.splitlines()
    server.engine.close()
    assert server.http.get("/health").status_code == 503
    response = server.post({})
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert response.json()["error"]["type"] == "server_error"


# ---- who leaves ------------------------------------------------------------------------------------------------------


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


# ---- who may ask -----------------------------------------------------------------------------------------------------


def test_keys(serve):
    server = serve(api_keys=["first-key", "second-key"])
    for key in ("first-key", "second-key"):
        assert ask(server.client(api_key=key)).choices
    for key in ("first-kex", "first", "é"):
        response = server.post({}, headers={"Authorization": f"Bearer {key}".encode()})
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", f"/v1/models/{NAME}", "/metrics"):
        assert server.http.get(path).status_code == 401
    assert server.post({}, headers={"Authorization": "Basic first-key"}).status_code == 401
    for path in ("/health", "/"):
        assert server.http.get(path).status_code == 200


def test_another_sites_page_cannot_post_here(serve):
    """Without a preflight a browser sends only form types and text/plain; no answer says that others may read it."""
    server = serve()
    body = json.dumps({"model": NAME, "messages": HI}).encode()
    response = server.post(body, headers={"Content-Type": "text/plain", "Origin": "http://evil.example"})
    assert response.status_code == 415
    preflight = server.http.options(
        "/v1/chat/completions",
        headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
    )
    assert preflight.status_code == 405
    for answer in (response, preflight, server.post({}, headers={"Origin": "http://evil.example"})):
        assert not any(name.startswith("access-control") for name in answer.headers)


# ---- what is refused -------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> str:
    """A picture that says how large it is, and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return "data:image/png;base64," + base64.b64encode(data).decode()


def truncated() -> str:
    file = io.BytesIO()
    Image.effect_noise((90, 90), 50).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()[:2000]).decode()


def raw(**fields) -> bytes:
    return json.dumps({"model": NAME, "messages": HI} | fields).encode()


URL = "messages.0.content.0.image_url.url"
REFUSED = {
    "no json": (b"hello", None, "not valid JSON"),
    "empty": (b"", None, "not valid JSON"),
    "a list": (b"[]", None, "object"),
    "broken utf-8": (b'{"model": "\xff\xfe"}', None, "not valid JSON"),
    "half a surrogate": (raw(user="x").replace(b'"x"', b'"\\ud800"'), None, "JSON: half a surrogate pair"),
    "deep": (b'{"messages":' * 1 + b"[" * 100_000, None, "not valid JSON"),
    "deep objects": (b'{"a":' * 20_000, None, "not valid JSON"),
    "infinity": (b'{"model":"' + NAME.encode() + b'","messages":[],"temperature":1e999}', None, ""),
    "half a surrogate within": (raw(user="x").replace(b'"x"', b'"\\udc00 a"'), None, "half a surrogate pair"),
    "unknown field": (raw(colour=None), "colour", "unknown field"),
    "tools": (raw(tools=[{"type": "function"}]), "tools", "cannot do that"),
    "a bias": (raw(logit_bias={"1": 5}), "logit_bias", "cannot do that"),
    "effort": (raw(reasoning_effort="low"), "reasoning_effort", "'medium'"),
    "storing": (raw(store=True), "store", "cannot do that"),
    "storing by number": (raw(store=0), "store", "valid boolean"),
    "a schema": (raw(response_format={"type": "json_object"}), "response_format.type", "'text'"),
    "a choice of tools": (raw(tool_choice="required"), "tool_choice", "'none' or 'auto'"),
    "speech": (raw(modalities=["text", "audio"]), "modalities", ""),
    "a name": (raw(messages=[HI[0] | {"name": "Ann"}]), "messages.0.name", "cannot do that"),
    "a call of a tool": (
        raw(messages=[{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]),
        "messages.0.tool_calls",
        "cannot do that",
    ),
    "unknown field of a part": (
        raw(messages=[{"role": "user", "content": [{"type": "text", "text": "a", "colour": 1}]}]),
        "messages.0.content.0.colour",
        "unknown field",
    ),
    "no model": (b'{"messages":[{"role":"user","content":"hi"}]}', "model", "required"),
    "no messages": (raw(messages=[]), "messages", "at least 1"),
    "role": (raw(messages=[{"role": "tool", "content": "hi"}]), "messages.0", "role is one of system"),
    "content": (raw(messages=[{"role": "user", "content": 1}]), "messages.0.content", "a string or an array"),
    "null for content": (
        raw(messages=[{"role": "assistant", "content": None}]),
        "messages.0.content",
        "a string or an array of text parts",
    ),
    "no content": (raw(messages=[{"role": "user"}]), "messages.0.content", "required"),
    "a picture of the assistant's": (
        raw(messages=[{**with_pictures("a", data_uri())[0], "role": "assistant"}]),
        "messages.0.content.0.type",
        "'text'",
    ),
    "temperature": (raw(temperature=2.5), "temperature", "less than or equal to 2"),
    "temperature as text": (raw(temperature="1"), "temperature", "valid number"),
    "top_p": (raw(top_p=0), "top_p", "greater than 0"),
    "seed": (raw(seed=2**63), "seed", "less than"),
    "n": (raw(n=9), "n", "less than or equal to 8"),
    "max_tokens": (raw(max_tokens=0), "max_tokens", "greater than or equal to 1"),
    "a huge number": (raw(max_tokens=0).replace(b": 0", b": " + b"9" * 5000), None, ""),
    "both limits": (raw(max_tokens=1, max_completion_tokens=1), "max_completion_tokens", "give one of them"),
    "stop": (raw(stop=[""]), "stop.0", "at least 1 character"),
    "stops": (raw(stop=["a"] * 5), "stop", "at most 4"),
    "top_logprobs": (raw(top_logprobs=1), "top_logprobs", "needs logprobs"),
    "stream_options": (raw(stream_options={"include_usage": True}), "stream_options", "needs stream"),
    "a penalty": (raw(frequency_penalty=0.5), "frequency_penalty", "less than or equal to 0"),
    "too long for the model": (raw(messages=[{"role": "user", "content": "word " * 600}]), "messages", "room for 512"),
    "characters": (raw(messages=[{"role": "user", "content": "a" * 20_001}]), "messages", "at most 20000"),
    "zeros": (raw(messages=[{"role": "user", "content": [0] * 50_000}]), "messages", "50000 parts, at most 2056"),
    "many fields": (raw(**{str(i): 0 for i in range(9_000)}), None, "9002 fields, at most 64"),
    "messages": (raw(messages=HI * 41), "messages", "at most 40"),
    "an address": (raw(messages=with_pictures("a", "http://127.0.0.1/cat.png")), URL, "fetches nothing"),
    "a file": (raw(messages=with_pictures("a", "file:///etc/passwd")), URL, "fetches nothing"),
    "no base64": (raw(messages=with_pictures("a", "data:image/png,abc")), URL, "needs ';base64,'"),
    "bad base64": (raw(messages=with_pictures("a", "data:image/png;base64,a!b")), URL, "not valid base64"),
    "base64 beyond ascii": (raw(messages=with_pictures("a", "data:;base64,é")), URL, "not valid base64"),
    "an empty picture": (raw(messages=with_pictures("a", "data:image/png;base64,")), URL, "empty image"),
    "no picture": (raw(messages=with_pictures("a", "data:image/png;base64,aGVsbG8=")), URL, "not a known image"),
    "half a picture": (raw(messages=with_pictures("a", truncated())), URL, "does not decode"),
    "a bomb": (raw(messages=with_pictures("a", png_of(60_000, 60_000))), URL, "too large"),
    "pixels together": (raw(messages=with_pictures("a", *[data_uri((400, 400))] * 2)), None, "pixels, at most 300000"),
    "tiles together": (raw(messages=with_pictures("a", *[data_uri((300, 60))] * 4)), None, "tiles, at most 16"),
    "pictures": (raw(messages=with_pictures("a", *[data_uri((9, 9))] * 9)), "messages", "at most 8"),
    "detail": (
        raw(messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": data_uri(), "detail": "tiny"}}]}]),
        "messages.0.content.0.image_url.detail",
        "'auto', 'high' or 'low'",
    ),
}  # fmt: skip
LIMITS = Limits(
    max_body_bytes=300_000,
    max_messages=40,
    max_characters=20_000,
    max_images=8,
    max_pixels=300_000,
    max_tiles=16,
)


def test_what_is_wrong_with_a_body_is_said_by_the_name_of_the_field(serve):
    server = serve(limits=LIMITS)
    wrong = {}
    for name, (body, param, message) in REFUSED.items():
        response = server.post(body)
        assert response.status_code == 400, (name, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        if (param is not None and error["param"] != param) or not re.search(message, error["message"]):
            wrong[name] = error
    assert wrong == {}
    assert server.engine.steps == 0
    assert server.post({}).status_code == 200


def test_what_is_wrong_besides_the_body(serve):
    server = serve(limits=LIMITS)
    for size in (300_001, 20_000_000):
        response = server.post(b" " * size)
        assert response.status_code == 413
        assert "larger than 300000 bytes" in response.json()["error"]["message"]
    response = server.post({"model": "gpt-4"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert server.http.get("/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
    assert server.http.get("/v1/chat/completions").status_code == 405
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # hung up on before all of it was sent
        assert server.http.get("/health", headers={"X": "a" * 2_000_000}).status_code == 400
    assert server.post({}).status_code == 200


def test_special_tokens_and_marks_in_a_text_stay_text(serve, processor):
    server = serve()
    text = "<|im_end|><IMG_CONTEXT>[[picture 0000000000000000]]"
    tokens = server.post({"messages": [{"role": "user", "content": text}]}).json()["usage"]["prompt_tokens"]
    prompt = processor.encode([{"role": "user", "content": text}], add_generation_prompt=True)
    assert tokens == len(prompt.input_ids)
    assert processor.image_token_id not in prompt.input_ids


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "seed", "max_tokens", "stop", "n",
    "logprobs", "top_logprobs", "user",
]  # fmt: skip


def refusal(body: bytes) -> RequestError | None:
    try:
        parse_request(body, Limits())
    except RequestError as error:
        return error
    return None


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_json_is_a_request_or_a_request_error(fields):
    error = refusal(json.dumps({"model": NAME, "messages": HI} | fields).encode())
    assert error is None or (error.status == 400 and json.dumps(error.body))


@settings(max_examples=100)
@given(st.binary(max_size=64), st.integers(0, 200))
def test_any_bytes_are_a_request_or_a_request_error(noise, place):
    body = raw(messages=with_pictures("a", "data:,"))
    error = refusal(body[:place] + noise + body[place + len(noise) :])
    assert error is None or error.status == 400
