"""What tests of the API share: something to ask, and how to wait for what other threads do."""

import base64
import io
import time
from collections.abc import Callable
from typing import Any

import openai
from PIL import Image

NAME = "tiny/hovle"
HI = [{"role": "user", "content": "hi"}]


def data_uri(size=(80, 60), colour="red") -> str:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def with_pictures(text: str, *urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(client: openai.OpenAI, messages=HI, **fields):
    return client.chat.completions.create(
        model=NAME, messages=messages, **{"max_tokens": 12, "temperature": 0} | fields
    )


def until(condition: Callable[[], Any], seconds: float = 60, every: float = 0.005) -> None:
    """Return once the condition holds, which fails the test if it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every)
