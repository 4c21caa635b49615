"""What is wrong with a request is said by the name of the field, and costs nothing."""

import base64
import contextlib
import io
import json
import re
import struct
import zlib

import httpx
from asking import HI, NAME, data_uri, with_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hovle_serve.protocol import Limits, RequestError, parse_request


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
