"""The app on a real Ray Serve of this machine."""

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from hovle_serve.chat import ChatSession
from hovle_serve.sampling import Sampling
from hovle_serve.serving import ServeConfig

ROOM = {"max_tokens": 8, "temperature": 0}


@pytest.fixture
def ray_serve(tmp_path_factory):
    """`ray_serve(config)`: deploy, and give the address."""
    import ray
    from ray import serve

    from hovle_serve.deployment import app

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def deploy(config: ServeConfig) -> str:
        serve.run(app(config), name="hovle", route_prefix="/")
        return f"http://127.0.0.1:{port}"

    yield deploy
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
def test_the_app_answers_on_ray_serve_as_the_model_does(ray_serve, checkpoint, model, processor):
    questions = ["hi", "what is this?", "blue", "a red square"]
    expected = [
        "".join(ChatSession(model, processor, sampling=Sampling(max_new_tokens=8)).ask(question))
        for question in questions
    ]
    url = ray_serve(ServeConfig(model=str(checkpoint), name="tiny", max_batch=4))
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:

        def ask(question: str, **fields) -> httpx.Response:
            body = {"model": "tiny", "messages": [{"role": "user", "content": question}], **ROOM, **fields}
            return http.post("/v1/chat/completions", json=body)

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda q: ask(q).json()["choices"][0]["message"]["content"], questions))
        assert answers == expected

        events = ask("hi", stream=True).text.strip().split("\n\n")
        assert events.pop() == "data: [DONE]"
        deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content", "") for delta in deltas) == expected[0]

        assert ask("hi", tools=[]).json()["error"]["param"] == "tools"
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"

        def metric(name: str) -> float:
            return float(re.search(rf"^{name} (\S+)$", http.get("/metrics").text, re.M)[1])

        # Eight long answers, of which four run at a time: whoever hangs up at the first event stops them all.
        said = metric("hovle_completion_tokens_total")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 450, "n": 8}
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            next(response.iter_lines())
        deadline = time.monotonic() + 60
        while metric("hovle_active_requests") or metric("hovle_waiting_requests"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert metric("hovle_completion_tokens_total") - said < 8 * 450
