"""`serve deploy hovle.yaml` on a real Ray of this machine: it grows, is updated and loses replicas under load."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import asking
import httpx
import pytest
import yaml
from ray.serve.exceptions import BackPressureError, DeploymentID, DeploymentUnavailableError
from ray.serve.handle import DeploymentResponseGenerator

from hovle_core.testing import tiny_hovle
from hovle_serve.chat import ChatSession
from hovle_serve.deployment import _replicas
from hovle_serve.gateway import ReplicaLostError, ReplicasBusyError
from hovle_serve.relay import Relayed
from hovle_serve.sampling import Sampling
from hovle_serve.serving import AccessConfig, ClusterConfig, EngineConfig

# A cluster takes its time.
until = partial(asking.until, seconds=240, every=0.2)

QUESTIONS = ["hi", "what is this?", "blue", "a red square", "and this one?", "circle"]
LONG = 300
# Decisions within seconds rather than minutes.
FAST = {"metrics_interval_s": 0.5, "look_back_period_s": 2, "upscale_delay_s": 0.5, "downscale_delay_s": 2}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Cluster:
    """Ray with its dashboard, which `serve deploy` talks to."""

    def __init__(self, folder: Path) -> None:
        import ray

        self.folder, self.port = folder, free_port()
        dashboard = free_port()
        ray.init(
            "local",
            num_cpus=8,
            dashboard_port=dashboard,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
        )
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120, trust_env=False)

    def deploy(self, args: dict[str, Any], **replicas: dict[str, Any]) -> None:
        """Write a config file and deploy it, as an operator does, and wait until it is as it says."""
        application = {
            "name": "hovle", "import_path": "hovle_serve.deployment:app", "route_prefix": "/", "args": args,
            "deployments": [
                {"name": name, "ray_actor_options": {"num_cpus": 0.5}, **fields} for name, fields in replicas.items()
            ],
        }  # fmt: skip
        http_options = {"host": "127.0.0.1", "port": self.port}
        path = self.folder / "hovle.yaml"
        path.write_text(yaml.safe_dump({"http_options": http_options, "applications": [application]}))
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(path), "-a", self.dashboard]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        until(lambda: self.application().status == "RUNNING")

    def application(self) -> Any:
        from ray import serve

        application = serve.status().applications["hovle"]
        assert application.status != "DEPLOY_FAILED", application
        return application

    def replicas(self, model: str) -> list[str]:
        """Names of the actors that answer for a model."""
        from ray.util import list_named_actors

        actors = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
        return [name for name in actors if name.startswith(f"SERVE_REPLICA::hovle#{model}#")]

    def running(self, model: str) -> int:
        return self.application().deployments[model].replica_states.get("RUNNING", 0)

    def ask(self, question: str, **fields: Any) -> httpx.Response:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
        } | fields
        return self.http.post("/v1/chat/completions", json=body)

    def metric(self, name: str, query: str = "") -> float:
        found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", self.http.get(f"/metrics{query}").text, re.M)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    import ray
    from ray import serve

    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.http.close()
    serve.shutdown()
    ray.shutdown()


def text_of(response: httpx.Response) -> str | None:
    """An answer's text; None of a stream that ended in an error."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == "application/json":
        return response.json()["choices"][0]["message"]["content"]
    events = [event.removeprefix("data: ") for event in response.text.strip().split("\n\n")]
    if events[-1] != "[DONE]":
        assert json.loads(events[-1])["error"]["type"] == "server_error"
        return None
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    return "".join(delta.get("content", "") for delta in deltas)


def said(model, processor, question: str, tokens: int) -> str:
    return "".join(ChatSession(model, processor, sampling=Sampling(max_new_tokens=tokens)).ask(question))


def test_one_models_fields_may_stand_alone_and_names_differ():
    one = ClusterConfig.model_validate({"model": "a/b", "max_batch": 3, "limits": {"max_images": 2}})
    assert [engine.served_name for engine in one.models] == ["a/b"]
    assert (one.models[0].max_batch, one.limits.max_images) == (3, 2)
    several = ClusterConfig.model_validate({"models": [{"model": "x"}, {"model": "y", "name": "z"}]})
    assert [engine.served_name for engine in several.models] == ["x", "z"]
    for wrong in (
        {}, {"models": []}, {"models": [{"model": "x", "limits": {}}]}, {"model": "x", "max_bach": 1},
        {"model": "x", "models": [{"model": "y"}]}, {"model": "x", "image_hosts": ["no host"]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=""):
            ClusterConfig.model_validate(wrong)
    with pytest.raises(ValueError, match="give an api_key_file"):
        AccessConfig.model_validate({"key_limits": {"max_in_flight": 2}})


def test_what_ray_is_given():
    from hovle_serve.deployment import app, deployment_name

    assert deployment_name(EngineConfig(model="OpenGVLab/HoVLE")) == "OpenGVLab-HoVLE"
    twice = ClusterConfig(models=[EngineConfig(model="x"), EngineConfig(model="y", name="x")])
    with pytest.raises(ValueError, match="two of them have one name"):
        app(twice)


def test_the_gateway_starts_without_what_a_model_needs():
    heavy = "[name for name in ('torch', 'transformers', 'PIL') if name in sys.modules]"
    code = f"import sys, hovle_serve.gateway, hovle_serve.serving; assert {heavy} == [], {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("refused", "heard"),
    [
        (BackPressureError(4, 4), ReplicasBusyError),
        (DeploymentUnavailableError(DeploymentID("tiny")), ReplicaLostError),
    ],
)
def test_what_ray_refuses_is_told_though_cancelling_it_raises_again(refused, heard):
    """As Ray's own response does, which holds what it was refused with."""

    class Refused(DeploymentResponseGenerator):
        def __init__(self) -> None:
            """Of nothing."""

        async def __anext__(self) -> None:
            raise refused

        def cancel(self) -> None:
            raise refused

    class Handle:
        def options(self, **options: Any) -> "Handle":
            return self

        def remote(self, request: Relayed) -> Refused:
            return Refused()

    async def ask() -> None:
        async for _ in _replicas(Handle())(Relayed("POST", "/")):
            raise AssertionError

    with pytest.raises(heard):
        asyncio.run(ask())


@pytest.mark.slow
def test_overload_says_when_to_come_back(cluster, checkpoint):
    model = {"model": str(checkpoint), "name": "tiny", "max_batch": 1, "max_queue": 1}
    cluster.deploy({"models": [model]}, tiny={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}})
    with ThreadPoolExecutor(24) as pool:
        answers = [*pool.map(lambda _: cluster.ask("hi", model="tiny", max_tokens=LONG), range(24))]
    assert {answer.status_code for answer in answers} <= {200, 429, 503}
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused, [answer.status_code for answer in answers]
    for answer in refused:
        assert answer.headers["Retry-After"] == "1"
        assert answer.json()["error"]["type"] == "server_error"


@pytest.mark.slow
def test_two_models_behind_one_address_answer_as_they_do_alone(
    cluster, checkpoint, model, processor, tmp_path
):
    other = tiny_hovle(processor.tokenizer, seed=1)
    other.generation_config.suppress_tokens = model.generation_config.suppress_tokens
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    models = [
        {"model": str(checkpoint), "name": "tiny", "max_batch": 4},
        {"model": str(tmp_path / "other"), "name": "an/other"},
    ]
    cluster.deploy({"models": models}, tiny={}, **{"an-other": {}})
    for name, its in (("tiny", model), ("an/other", other)):
        expected = [said(its, processor, question, 8) for question in QUESTIONS]
        fields = {"model": name, "max_tokens": 8}
        with ThreadPoolExecutor(4) as pool:
            assert [
                *pool.map(lambda q, fields=fields: text_of(cluster.ask(q, **fields)), QUESTIONS)
            ] == expected
        assert text_of(cluster.ask(QUESTIONS[0], stream=True, **fields)) == expected[0]
    assert said(other, processor, "hi", 8) != said(model, processor, "hi", 8)
    assert cluster.ask("hi", tools=[{"type": "function"}]).json()["error"]["param"] == "tools"
    assert cluster.http.get("/health").json() == {"status": "ok"}
    assert [model["id"] for model in cluster.http.get("/v1/models").json()["data"]] == ["tiny", "an/other"]
    assert "<title>HoVLE" in cluster.http.get("/").text

    # Eight long answers, of which four run at a time: whoever hangs up at the first event stops them all.
    one = "?model=tiny"
    before = cluster.metric("hovle_completion_tokens_total", one)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 450, "n": 8}
    with cluster.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        next(response.iter_lines())
    names = ("hovle_active_requests", "hovle_waiting_requests")
    until(lambda: not any(cluster.metric(name, one) for name in names), seconds=60)
    assert cluster.metric("hovle_completion_tokens_total", one) - before < 8 * 450


@pytest.mark.slow
def test_a_killed_replica_costs_only_the_streams_it_had_begun(cluster, checkpoint, model, processor):
    import ray

    args = {"model": str(checkpoint), "name": "tiny", "max_batch": 4}
    two = {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}}
    cluster.deploy(args, tiny=two)
    until(lambda: cluster.running("tiny") == 2)
    expected = [said(model, processor, question, LONG) for question in QUESTIONS]
    retries = cluster.metric("hovle_retries_total")
    with ThreadPoolExecutor(2 * len(QUESTIONS)) as pool:
        whole = [pool.submit(cluster.ask, question, max_tokens=LONG) for question in QUESTIONS]
        streams = [pool.submit(cluster.ask, question, max_tokens=LONG, stream=True) for question in QUESTIONS]
        time.sleep(0.7)
        victim = cluster.replicas("tiny")[0]
        ray.kill(ray.get_actor(victim, namespace="serve"))
        assert [text_of(one.result()) for one in whole] == expected
        heard = [text_of(one.result()) for one in streams]
    assert all(text in (None, wanted) for text, wanted in zip(heard, expected, strict=True))
    lost = heard.count(None)
    assert lost < len(streams)
    retried = cluster.metric("hovle_retries_total") - retries
    print(f"killed one of two: {retried:.0f} requests retried, {lost} of {len(streams)} streams lost")
    assert retried + lost > 0
    until(lambda: cluster.running("tiny") == 2 and victim not in cluster.replicas("tiny"))
    assert text_of(cluster.ask(QUESTIONS[0], max_tokens=LONG)) == expected[0]


class Load:
    """Clients that ask one question after the other until told to stop."""

    def __init__(self, cluster: Cluster, clients: int, tokens: int) -> None:
        self.answers: list[tuple[str, str | None]] = []
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._work = [self._pool.submit(self._run, cluster, tokens, i) for i in range(clients)]

    def _run(self, cluster: Cluster, tokens: int, client: int) -> None:
        for i in range(client, 1_000_000):
            if self._stop.is_set():
                return
            question = QUESTIONS[i % len(QUESTIONS)]
            answer = cluster.ask(question, max_tokens=tokens, stream=bool(client % 2))
            self.answers.append((question, text_of(answer)))
            self._stop.wait(0.1)  # new replicas start on the same cores

    def stop(self) -> list[tuple[str, str | None]]:
        """All answers; raises what a client met with."""
        self._stop.set()
        for work in self._work:
            work.result()
        self._pool.shutdown()
        return self.answers


@pytest.mark.slow
def test_an_update_under_load_loses_no_request(cluster, checkpoint, model, processor):
    args = {"model": str(checkpoint), "name": "tiny", "max_batch": 4}
    one = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}}
    cluster.deploy(args, tiny=one)
    until(lambda: len(cluster.replicas("tiny")) == 1)
    before = set(cluster.replicas("tiny") + cluster.replicas("gateway"))
    load = Load(cluster, clients=2, tokens=40)
    until(lambda: len(load.answers) > 4)
    cluster.deploy({**args, "max_batch": 3, "limits": {"max_images": 7}}, tiny=one)
    during = len(load.answers)
    until(lambda: len(load.answers) > during + 4)
    answers = load.stop()
    expected = {question: said(model, processor, question, 40) for question in QUESTIONS}
    assert [question for question, text in answers if text != expected[question]] == []
    until(lambda: not before & set(cluster.replicas("tiny") + cluster.replicas("gateway")))
    print(f"an update under load: {len(answers)} requests, none lost")
    images = [{"type": "image_url", "image_url": {"url": "data:,"}}] * 8
    refused = cluster.ask("", messages=[{"role": "user", "content": images}])
    assert "at most 7" in refused.json()["error"]["message"]


@pytest.mark.slow
def test_replicas_follow_the_requests_in_flight(cluster, checkpoint):
    args = {"model": str(checkpoint), "name": "tiny", "max_batch": 4}
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, **FAST}
    cluster.deploy(args, tiny={"autoscaling_config": scaling})
    until(lambda: cluster.running("tiny") == 1)
    load = Load(cluster, clients=4, tokens=100)
    until(lambda: cluster.running("tiny") == 2)
    answers = load.stop()
    until(lambda: cluster.running("tiny") == 1)
    assert None not in [text for _, text in answers]
