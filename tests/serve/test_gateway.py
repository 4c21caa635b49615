"""The gateway before replicas, which here are apps of this process; tests/serve/test_deployment.py has real ones."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, contextmanager

import httpx
import pytest
from asking import HI

from hovle_serve.access import Access
from hovle_serve.api import create_app
from hovle_serve.engine import Engine
from hovle_serve.gateway import ReplicaLostError, ReplicasBusyError, create_gateway
from hovle_serve.protocol import Limits
from hovle_serve.relay import Relayed, answered


@pytest.fixture
def engine(model, processor):
    with Engine(model, processor) as engine:
        yield engine


@pytest.fixture
def app(engine):
    return create_app(engine, "tiny")


@contextmanager
def talking(replicas, **arguments):
    """`post(body)` to a gateway whose one model has these replicas."""
    app = create_gateway({"tiny": replicas}, arguments.get("access", Access()), Limits())
    loop = asyncio.new_event_loop()
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")

    def send(method: str, path: str, **fields) -> httpx.Response:
        return loop.run_until_complete(client.request(method, path, **fields))

    try:
        yield send
    finally:
        loop.run_until_complete(client.aclose())
        loop.close()


def ask(send, **fields) -> httpx.Response:
    body = {"model": "tiny", "messages": HI, "max_tokens": 8, "temperature": 0} | fields
    return send("POST", "/v1/chat/completions", json=body)


def text(response: httpx.Response) -> str:
    if response.headers["content-type"] == "application/json":
        return response.json()["choices"][0]["message"]["content"]
    events = response.text.strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    return "".join(delta.get("content", "") for delta in deltas)


def test_an_answer_through_the_gateway_is_the_replicas(app):
    with talking(lambda request: answered(app, request)) as send:
        whole = ask(send)
        assert whole.status_code == 200
        assert text(ask(send, stream=True)) == text(whole)
        assert ask(send, tools=[{"type": "function"}]).json()["error"]["param"] == "tools"
        long = ask(send, messages=[{"role": "user", "content": "word " * 600}])
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert (
            ask(send, model="other").json()["error"]["message"]
            == "there is no model 'other' here, only 'tiny'"
        )
        assert [model["id"] for model in send("GET", "/v1/models").json()["data"]] == ["tiny"]
        assert send("GET", "/health").json() == {"status": "ok"}
        assert 'hovle_responses_total{status="400"} 2.0' in send("GET", "/metrics").text
        assert "hovle_completion_tokens_total 16.0" in send("GET", "/metrics?model=tiny").text


def test_keys_are_the_gateways(app):
    with talking(lambda request: answered(app, request), access=Access(["secret"])) as send:
        assert ask(send).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert send("GET", "/v1/models", headers=key).status_code == 200
        for path in ("/v1/models", "/metrics", "/metrics?model=tiny"):
            assert send("GET", path).status_code == 401


class Losing:
    """Replicas that die, the first of them: before they say anything, or after `after` messages."""

    def __init__(self, app, deaths: int, after: int = 0) -> None:
        self.app, self.deaths, self.after = app, deaths, after
        self.asked = 0

    async def __call__(self, request: Relayed) -> AsyncGenerator:
        self.asked += 1
        dies, count = self.asked <= self.deaths, 0
        async with aclosing(answered(self.app, request)) as messages:
            async for together in messages:
                if dies and count >= self.after:
                    raise ReplicaLostError("killed")
                count += 1
                yield together


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_dies_before_it_answers_costs_nothing(app, stream, monkeypatch):
    monkeypatch.setattr("hovle_serve.gateway.RETRY_SECONDS", 0.001)
    with talking(lambda request: answered(app, request)) as send:
        expected = text(ask(send))
    with talking(losing := Losing(app, deaths=2)) as send:
        assert text(ask(send, stream=stream)) == expected
        assert losing.asked == 3
        assert 'hovle_retries_total{model="tiny"} 2.0' in send("GET", "/metrics").text
    with talking(Losing(app, deaths=100)) as send:
        lost = ask(send, stream=stream)
        assert lost.status_code == 503
        assert lost.headers["Retry-After"] == "1"
        assert "no replica that answers" in lost.json()["error"]["message"]


def test_one_that_dies_in_the_middle_of_a_stream_is_told_and_not_answered_twice(app):
    with talking(losing := Losing(app, deaths=1, after=3)) as send:
        response = ask(send, stream=True, max_tokens=100)
        assert losing.asked == 1
        events = response.text.strip().split("\n\n")
        assert "data: [DONE]" not in events
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["message"] == "the replica that answered was lost"


def test_overload_says_when_to_come_back():
    async def full(request: Relayed) -> AsyncGenerator:
        raise ReplicasBusyError
        yield

    with talking(full) as send:
        response = ask(send)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


@pytest.mark.parametrize("stream", [False, True])
def test_who_stops_listening_frees_the_replicas_place(app, engine, model, stream):
    model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    body = json.dumps({"model": "tiny", "messages": HI, "max_tokens": 450, "stream": stream}).encode()
    request = Relayed("POST", "/v1/chat/completions", ((b"content-type", b"application/json"),), body)

    async def listen_a_little() -> None:
        messages = answered(app, request)
        first = asyncio.ensure_future(anext(messages))
        while not engine.num_active:
            await asyncio.sleep(0.001)
        if stream:
            await first
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await messages.aclose()

    asyncio.run(listen_a_little())
    deadline = time.monotonic() + 60
    while engine.num_active:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.steps < 400
