"""A tiny HoVLE that speaks ASCII, on disk and behind a socket, and pictures."""

import json
import signal
import socket
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest
from PIL import Image

from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer
from hovle_serve import engine, stream
from hovle_serve.access import Access
from hovle_serve.api import create_app
from hovle_serve.chat import ChatSession
from hovle_serve.engine import Engine
from hovle_serve.listener import server as http_server
from hovle_serve.sampling import Sampling


@pytest.fixture(scope="session")
def processor():
    return tiny_processor(tiny_tokenizer())


@pytest.fixture
def model(processor):
    """Random weights; tokens that are no printable ASCII are never said, so every token is a piece."""
    model = tiny_hovle(processor.tokenizer)
    silent = [
        token_id
        for token_id in range(len(processor.tokenizer))
        if not (text := processor.tokenizer.decode([token_id], skip_special_tokens=True)).isprintable()
        or not text.isascii()
        or not text
    ]
    model.generation_config.suppress_tokens = silent
    return model


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def session(model, processor):
    return ChatSession(model, processor, sampling=Sampling(max_new_tokens=6))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red square.png"
    Image.new("RGB", (80, 60), "red").save(path)
    return path


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell starts background jobs with Ctrl-C ignored, and CI may be one; a person's terminal does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    ours = [
        thread for thread in threading.enumerate() if thread.name in (stream.THREAD_NAME, engine.THREAD_NAME)
    ]
    for thread in ours:  # one that was told to stop may be at its last line
        thread.join(timeout=10)
    assert not [thread for thread in ours if thread.is_alive()]


class Served:
    """A server on a port of its own, which serves the tiny model as "tiny/hovle"."""

    name = "tiny/hovle"

    def __init__(self, engine: Engine, api_keys=(), key_limits=None, **arguments) -> None:
        self.engine = engine
        self.app = create_app(engine, self.name, Access(api_keys, key_limits), **arguments)
        self._server = http_server(self.app, log_level="critical")
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def client(self, **arguments) -> openai.OpenAI:
        http = httpx.Client(trust_env=False)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", http_client=http, **{"api_key": "any", "max_retries": 0} | arguments
        )

    def post(self, body, **fields) -> httpx.Response:
        """`body`: bytes as they are, or the fields of a request beside model and messages."""
        if isinstance(body, dict):
            body = json.dumps(
                {
                    "model": self.name,
                    "messages": [{"role": "user", "content": "hi"}],
                    "max_tokens": 4,
                    "temperature": 0,
                }
                | body
            ).encode()
        headers = {"Content-Type": "application/json"} | fields.pop("headers", {})
        return self.http.post("/v1/chat/completions", content=body, headers=headers, **fields)

    def stop(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        assert not self.engine.is_running


@pytest.fixture
def serve(model, processor) -> Iterator:
    """`serve(limits=..., api_keys=..., max_batch=...)`."""
    servers = []

    def start(max_batch=8, max_queue=16, **arguments) -> Served:
        servers.append(
            Served(Engine(model, processor, max_batch=max_batch, max_queue=max_queue), **arguments)
        )
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
