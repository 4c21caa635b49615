"""Bodies from a seed, most of them almost right: each is answered, or refused by a 4xx in OpenAI's shape."""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from PIL import Image

from hovle_serve.api import create_app
from hovle_serve.engine import Engine
from hovle_serve.protocol import Limits
from hovle_serve.relay import Relayed, answered

NAME = "tiny"
LIMITS = Limits(max_body_bytes=200_000, max_images=4, max_pixels=200_000, max_tiles=12)
ODD = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 1e999, -1e999, 0.5, 1e-9, "", "a", "é\u2028\x00", "\U0001f600" * 9, [],
    {}, [[]], [None], {"type": "text"}, "<|im_end|>", "data:image/png;base64,", "http://127.0.0.1/", ["a"] * 5,
    {"": {}},
]  # fmt: skip


def picture(rng: random.Random) -> str:
    file = io.BytesIO()
    size = rng.choice([(1, 1), (60, 60), (300, 60), (500, 500), (2, 500)])
    Image.new(rng.choice(["RGB", "L", "RGBA", "P"]), size).save(file, rng.choice(["PNG", "GIF", "TIFF"]))
    data = bytearray(file.getvalue())
    for _ in range(rng.choice([0, 0, 1, 20])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    text = base64.b64encode(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])]).decode()
    return rng.choice(["data:image/png;base64,", "data:;base64,", "DATA:image/x;BASE64,", "data:,"]) + text


def request(rng: random.Random) -> dict[str, Any]:
    def part() -> dict[str, Any]:
        if rng.random() < 0.5:
            return {"type": "text", "text": "word " * rng.randrange(4)}
        return {"type": "image_url", "image_url": {"url": picture(rng)}}

    def message() -> dict[str, Any]:
        content = "hi" if rng.random() < 0.4 else [part() for _ in range(rng.randrange(1, 4))]
        return {"role": rng.choice(["user", "user", "user", "system", "assistant"]), "content": content}

    body = {"model": NAME, "messages": [message() for _ in range(rng.randrange(1, 4))], "max_tokens": 1}
    more = {
        "stream": rng.random() < 0.5, "temperature": rng.random() * 2, "top_p": rng.random() + 1e-9, "n": 1,
        "seed": rng.randrange(100), "stop": ["e"], "logprobs": True, "user": "me",
    }  # fmt: skip
    return body | {name: value for name, value in more.items() if rng.random() < 0.2}


def spoiled(value: Any, rng: random.Random) -> Any:
    """One place somewhere within changed, taken away or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        roll = rng.random()
        if roll < 0.1:
            return {key: inner for key, inner in value.items() if key != name}
        if roll < 0.2:
            return value | {name + "x": value[name]}
        return value | {name: spoiled(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        return value[:i] + [spoiled(value[i], rng)] + value[i + 1 :] * rng.choice([1, 1, 1, 50])
    return rng.choice(ODD)


def body(rng: random.Random) -> bytes:
    value = request(rng)
    for _ in range(rng.choice([0, 1, 1, 2])):
        value = spoiled(value, rng)
    raw = bytearray(json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
    roll = rng.random()
    if roll < 0.1:
        for _ in range(rng.randrange(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif roll < 0.15:
        del raw[rng.randrange(len(raw)) :]
    elif roll < 0.17:
        return b'{"messages":' + rng.choice([b"[", b'{"a":']) * rng.randrange(30_000)
    return bytes(raw)


async def outcome(app: Any, raw: bytes) -> tuple[int, bytes]:
    relayed = Relayed("POST", "/v1/chat/completions", ((b"content-type", b"application/json"),), raw)
    messages = [message async for together in answered(app, relayed) for message in together]
    return messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:])


def check(status: int, answer: bytes) -> None:
    if status == 200:
        if answer.startswith(b"data: "):
            assert answer.endswith(b"data: [DONE]\n\n"), answer
        else:
            assert json.loads(answer)["usage"]["completion_tokens"] >= 1
        return
    assert 400 <= status < 500, answer
    error = json.loads(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 2000


# 20,000 in parts, so that each ends in time on a busy machine.
PARTS = [pytest.param(2_000, seed, marks=pytest.mark.slow) for seed in range(1, 11)]


@pytest.mark.parametrize(("count", "seed"), [(300, 0), *PARTS])
def test_bodies_from_a_seed_are_answered_or_refused(model, processor, count, seed):
    rng, statuses = random.Random(seed), Counter[int]()
    process = psutil.Process()
    with Engine(model, processor, max_cache_tokens=150, max_prefix_tokens=1000) as engine:
        app = create_app(engine, NAME, limits=LIMITS)

        async def run(progress: Callable[[int], None]) -> None:
            for i in range(count):
                raw = body(rng)
                status, answer = await outcome(app, raw)
                try:
                    check(status, answer)
                except (AssertionError, ValueError, LookupError) as error:
                    raise AssertionError(
                        f"seed {seed}, body {i}: {raw[:3000]!r}: {status} {answer[:500]!r}"
                    ) from error
                statuses[status] += 1
                progress(i)

        memory: list[int] = []

        def progress(i: int) -> None:
            if i % 100 == 99:
                memory.append(process.memory_info().rss)

        asyncio.run(run(progress))
        deadline = time.monotonic() + 60  # a place is free a moment after the last token went out
        while engine.num_active or engine.num_waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert engine.cached_tokens == 0
    print(
        f"{count} bodies of seed {seed}: {dict(statuses)}; memory from {memory[0] >> 20} to {memory[-1] >> 20} MiB"
    )
    assert statuses[200] > count / 20
    assert statuses[400] > count / 4
    assert memory[-1] - memory[0] < 100e6
