"""`hovle submit`: what a job carries is enough to run, and a real job on a head and an extra node comes back whole."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from hovle_core.cli import main
from hovle_core.plugins import load_plugins
from hovle_train import submit
from hovle_train.pipeline import load_pipeline
from hovle_train.runs import is_finished, read_summary
from hovle_train.submit import pack_workspace

BIN = Path(sys.executable).parent


@pytest.fixture
def plugin_here(tmp_path, monkeypatch):
    """A plugin that is installed here and nowhere else: a teacher of one grey value a patch."""
    site = tmp_path / "site"
    package = site / "hovle_greys"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(
        "from hovle_core.hookspecs import hookimpl\n"
        "from hovle_core.registry import Spec\n"
        "HOVLE_HOOK_API = 1\n"
        "@hookimpl\n"
        "def hovle_teachers():\n"
        "    return [Spec('greys', 'hovle_greys.teacher:Greys')]\n"
    )
    (package / "teacher.py").write_text(
        "from hovle_core.testing import GridTeacher\nclass Greys(GridTeacher): ...\n"
    )
    info = site / "hovle_greys-0.3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hovle-greys\nVersion: 0.3.0\n")
    (info / "entry_points.txt").write_text(
        "[hovle]\ngreys = hovle_greys.plugin\nsilent = hovle_greys_silent\n"
    )
    # A second package of the same distribution.
    (site / "hovle_greys_silent.py").write_text("HOVLE_HOOK_API = 1\n")
    monkeypatch.syspath_prepend(site)
    yield
    for module in [name for name in sys.modules if name.startswith("hovle_greys")]:
        del sys.modules[module]


@pytest.fixture
def pipeline_file(world, tmp_path):
    """Distillation by that teacher, then alignment; two workers of one core."""
    content = {
        "run_dir": str(tmp_path / "runs"),
        "common": {
            "optim": {"lr": 3e-3},
            "train": {"steps": 2, "global_batch_size": 4, "micro_batch_tokens": 96, "precision": "float32"},
            "resources": {"num_workers": 2, "cpus_per_worker": 1},
            "observers": {"wandb": "disabled"},
        },
        "stages": {
            "distillation": {
                "stage": {"options": {"teacher": {"name": "greys"}}},
                "model": {
                    "backbone": {"name": "transformers", "options": {"path": str(world / "llm")}},
                    "embedding": {"num_hidden_layers": 2, "image_size": 56},
                },
                "data": {
                    "images": [{"path": str(world / "images")}],
                    "texts": [{"path": str(world / "texts")}],
                    "text_tokens": [4, 8],
                },
            },
            "alignment": {"data": {"sources": [{"path": str(world / "pairs")}]}},
        },
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_head_that_has_just_started_is_waited_for(monkeypatch):
    class Client:
        calls = 0

        def submit_job(self, entrypoint):
            self.calls += 1
            if self.calls < 3:
                raise RuntimeError("Request failed with status code 500: No available agent to submit job")
            return entrypoint

    client = Client()
    monkeypatch.setattr(submit, "POLL_S", 0)
    assert submit._submit(client, entrypoint="x") == "x"
    monkeypatch.setattr(submit, "AGENT_SECONDS", -1)
    client.calls = 0
    with pytest.raises(RuntimeError, match="No available agent"):
        submit._submit(client, entrypoint="x")


def test_a_jobs_folder_is_enough(plugin_here, pipeline_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registry = load_plugins().registry
    folder = tmp_path / "job"
    folder.mkdir()
    pack_workspace(folder, load_pipeline(pipeline_file, ["run_dir=here"], registry))
    assert not list(folder.rglob("__pycache__"))
    script = (
        "import json, hovle_core, hovle_train; from hovle_core.plugins import load_plugins; p = load_plugins(); "
        "print(json.dumps([hovle_core.__file__, hovle_train.__file__, p.versions]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    core, train, versions = json.loads(done.stdout)
    assert Path(core).is_relative_to(folder)
    assert Path(train).is_relative_to(folder)
    assert versions["greys"] == versions["silent"] == "hovle-greys 0.3.0"
    assert versions == load_plugins().versions
    recipes = load_pipeline(folder / "job.yaml", [], registry).recipes
    assert recipes["alignment"].run_dir == str(tmp_path / "here" / "alignment")
    assert recipes["alignment"].model.init_from == recipes["distillation"].run_dir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no cluster named: give --address"),
        (["--address", "http://127.0.0.1:1"], "--address http://127.0.0.1:1: "),
        (["--address", "http://127.0.0.1:1", "--env", "X"], "--env 'X' must read KEY=VALUE"),
        (["--address", "http://127.0.0.1:1", "--until", "nothing"], "--until nothing: no such stage"),
        (["--set", "distillation.stage.options.haed=mlp"], "haed: unknown key"),
        (["--set", 'alignment.observers={"wanb": {}}'], "wanb"),
        # Ray looks for such a one for half a minute.
        pytest.param(["--address", "localhost:1"], "it looks like http://HEAD:8265", marks=pytest.mark.slow),
    ],
)
def test_mistakes_are_named_here(arguments, message, plugin_here, pipeline_file, capsys, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(["submit", str(pipeline_file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_kuberay_manifest_runs_a_command_that_exists_and_mounts_what_it_declares(capsys):
    job = yaml.safe_load((Path(__file__).parents[2] / "docs" / "rayjob.yaml").read_text())["spec"]
    program, *arguments = job["entrypoint"].split()
    assert program == "hovle"
    assert main(arguments) == 2
    assert "no recipe file '/shared/pipeline.yaml'" in capsys.readouterr().err, (
        "but for the file it is well formed"
    )
    cluster = job["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert "/shared" in {m["mountPath"] for m in container["volumeMounts"]}
    assert yaml.safe_load(job["runtimeEnvYAML"]).keys() == {"env_vars"}


def free_ports(count):
    """Ports nobody listens on now, outside the range that Ray gives to workers."""
    ports = []
    while len(ports) < count:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            if sock.getsockname()[1] > 20000:
                ports.append(sock.getsockname()[1])
    return ports


@contextmanager
def ray_node(*arguments):
    """`ray start --block`, and the end of all that it started."""
    names = ("node-manager-port", "object-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
             "runtime-env-agent-port", "metrics-export-port")  # fmt: skip
    ports = [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")
    }
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [
        str(BIN / "ray"),
        "start",
        "--block",
        "--num-cpus=1",
        "--object-store-memory=100000000",
        *ports,
    ]
    node = subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield node
    finally:
        started = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(20)
        except subprocess.TimeoutExpired:
            node.kill()
        for process in psutil.wait_procs(started, timeout=5)[1]:
            process.kill()


@pytest.fixture
def cluster(monkeypatch):
    """A head and an extra node of one core each, started as people start them; gives the dashboard's address."""
    folder = tempfile.mkdtemp(prefix="hv", dir="/tmp")  # short: a unix socket's path has a limit
    port, dashboard, client = free_ports(3)
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            "--include-dashboard=true", f"--temp-dir={folder}", "--disable-usage-stats"]  # fmt: skip
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with ray_node(*head) as first:
        wait_for_port(dashboard, first)
        with ray_node(f"--address=127.0.0.1:{port}"):
            yield f"http://127.0.0.1:{dashboard}"
    shutil.rmtree(folder, ignore_errors=True)


def wait_for_port(port, process, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended"
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


@pytest.mark.slow
def test_a_pipeline_runs_on_a_head_and_an_extra_node(cluster, plugin_here, pipeline_file, tmp_path, capfd):
    """Two workers of one core on two nodes of one core, with a plugin that is not installed there; then a failure."""
    assert main(["submit", str(pipeline_file), "--address", cluster, "--submission-id", "both"]) == 0
    printed = capfd.readouterr().out
    assert "submitted both" in printed
    assert "distillation: " in printed, "the job's own log"
    assert "both: SUCCEEDED" in printed
    for stage in ("distillation", "alignment"):
        assert is_finished(tmp_path / "runs" / stage)
        assert read_summary(tmp_path / "runs" / stage)["num_workers"] == 2
    assert read_summary(tmp_path / "runs" / "distillation")["plugins"]["greys"] == "hovle-greys 0.3.0"

    arguments = ["--set", "alignment.optim.lr=1.0", "--from", "alignment"]
    assert main(["submit", str(pipeline_file), "--address", cluster, *arguments]) == 2
    printed = capfd.readouterr().out
    assert "made by another recipe (optim.lr: 0.003, now 1.0)" in printed
    assert "FAILED" in printed
