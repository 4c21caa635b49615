"""Runs on a Ray cluster of several nodes: stages find their nodes, unequal workers share a step, and whatever dies, the
run or the same command goes on to the very weights of an undisturbed one.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from hovle_train.checkpoint import complete_checkpoints
from hovle_train.metrics import read_metrics
from hovle_train.ray_trainer import RAY_ENVIRONMENT, RecipeError, run_local, run_on_ray

pytestmark = pytest.mark.slow

TRAIN = {"steps": 120, "checkpoint_every": 10}
TWO = {"num_workers": 2, "cpus_per_worker": 1, "custom": {"trainer": 1}}
COMMAND = [sys.executable, "-c", "import sys; from hovle_core.cli import main; sys.exit(main())", "train"]


@pytest.fixture(scope="module")
def nodes():
    """A head without workers, and three nodes with room for one of them each; the last one is of another kind."""
    for name, value in (RAY_ENVIRONMENT | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}).items():
        os.environ.setdefault(name, value)
    cluster = Cluster()
    little = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    kinds = [("plain", {}), ("plain", {}), ("other", {"teacher": 1})]
    try:
        cluster.add_node(include_dashboard=False, **little)
        added = [
            cluster.add_node(resources={"trainer": 1, **more}, labels={"pool": pool}, **little)
            for pool, more in kinds
        ]
        ray.init(address=cluster.address, log_to_driver=False)
        yield added
    finally:
        ray.shutdown()
        cluster.shutdown()


def processes(name):
    """Processes of this one's Ray by a part of their command."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # others end meanwhile
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def workers():
    return processes("RayTrainWorker")


def at_step(recipe, step, act):
    """Call `act` in a thread once the run has logged `step`; joins to what it returned."""

    def watch():
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            records = read_metrics(recipe.path / "metrics.jsonl")
            if records and records[-1]["step"] >= step:
                try:
                    done.append(act() or True)
                except Exception as error:
                    done.append(error)
                return
            time.sleep(0.02)

    done: list = []
    thread = threading.Thread(target=watch)
    thread.start()

    def join():
        thread.join()
        assert done, f"the run never came to step {step}"
        if isinstance(done[0], Exception):
            raise done[0]
        return done[0]

    return join


def assert_same_weights(a, b):
    first, second = (load_file(recipe.path / "final" / "model.safetensors") for recipe in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("chosen", [{"custom": {"teacher": 1}}, {"labels": {"pool": "other"}}])
def test_a_stage_runs_on_the_nodes_it_asks_for(nodes, make_recipe, chosen):
    recipe = make_recipe("alignment", train={"steps": 60}, resources={"cpus_per_worker": 1, **chosen})
    join = at_step(recipe, 1, lambda: [worker.ppid() for worker in workers()])
    run_on_ray(recipe)
    assert join() == [nodes[-1].all_processes["raylet"][0].process.pid]


def test_teachers_on_their_own_node_teach_what_the_worker_s_own_would(nodes, make_recipe, tmp_path):
    options = {"teacher": {"name": "efficientnet-lite0"}}
    train = {"steps": 30, "checkpoint_every": 100}
    own = make_recipe("distillation", options, run_dir=str(tmp_path / "own"), train=train)
    run_local(own)
    resources = {
        "cpus_per_worker": 1,
        "labels": {"pool": "plain"},
        "teacher_pool": {"custom": {"teacher": 1}},
    }
    pooled = make_recipe(
        "distillation", options, run_dir=str(tmp_path / "pooled"), train=train, resources=resources
    )
    join = at_step(pooled, 1, lambda: [(w.name(), w.ppid()) for w in processes("ray::Teacher")])
    run_on_ray(pooled)
    assert [ppid for _, ppid in join()] == [nodes[-1].all_processes["raylet"][0].process.pid]
    for name in ("image_cosine", "text_cosine"):
        curves = [[line[name] for line in read_metrics(r.path / "metrics.jsonl")] for r in (own, pooled)]
        assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_an_unequal_group_computes_what_an_equal_one_does(nodes, make_recipe, tmp_path):
    """One of two workers is frozen for three quarters of the time.

    Few steps and a small learning rate, because rounding grows: at 3e-3 the losses of two equal workers are 1e-7 from
    those of one at first, and 1e-2 after 60 steps.
    """
    train, optim = {"steps": 40, "global_batch_size": 16}, {"lr": 3e-4}
    alone = make_recipe("alignment", run_dir=str(tmp_path / "alone"), train=train, optim=optim)
    run_local(alone)
    shared = make_recipe(
        "alignment",
        run_dir=str(tmp_path / "shared"),
        train=train,
        optim=optim,
        resources={**TWO, "balance": True},
    )

    def slow_down():
        worker = workers()[-1]
        with suppress(psutil.NoSuchProcess):  # the run is over
            while True:
                worker.suspend()
                time.sleep(0.03)
                worker.resume()
                time.sleep(0.01)

    join = at_step(shared, 1, slow_down)
    run_on_ray(shared)
    join()
    curves = [[line["loss"] for line in read_metrics(r.path / "metrics.jsonl")] for r in (alone, shared)]
    assert curves[1] == pytest.approx(curves[0], rel=5e-4)
    shares = [line["largest_share"] for line in read_metrics(shared.path / "metrics.jsonl")]
    assert shares[0] == 0.5
    assert max(shares) > 0.6


def test_a_killed_rank_and_a_stopped_node_under_fsdp2(nodes, make_recipe, tmp_path):
    sections = {"train": TRAIN, "resources": TWO, "parallel": {"strategy": "fsdp2"}}
    whole = make_recipe("alignment", run_dir=str(tmp_path / "whole"), **sections)
    run_on_ray(whole)
    killed = make_recipe("alignment", run_dir=str(tmp_path / "killed"), **sections)
    join = at_step(killed, 35, lambda: workers()[-1].kill())
    run_on_ray(killed)
    join()
    assert_same_weights(whole, killed)

    stopped = make_recipe("alignment", run_dir=str(tmp_path / "stopped"), **sections)

    def stop_node():
        raylet = workers()[0].parent()
        assert "raylet" in raylet.name()
        raylet.kill()
        raylet.wait()  # a worker leaves once its raylet is gone, and a zombie is not

    join = at_step(stopped, 35, stop_node)
    run_on_ray(stopped)
    join()
    assert_same_weights(whole, stopped)


def test_a_run_that_waits_for_nodes_says_so_and_stops_when_asked(nodes, make_recipe, tmp_path):
    recipe = make_recipe("alignment", resources={"cpus_per_worker": 1, "custom": {"trianer": 1}})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen([*COMMAND, str(path)], env=environment, stderr=subprocess.PIPE, text=True)
    too_long = threading.Timer(200, driver.kill)
    too_long.start()
    try:
        said = ""
        while "waiting for nodes" not in said:
            line = driver.stderr.readline()
            assert line, said
            said += line
        assert "trianer 1" in said
        time.sleep(5)  # Ray Train asks for a worker
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == 75
    finally:
        too_long.cancel()
        driver.kill()


def test_a_frozen_rank_ends_the_run_in_bounded_time(nodes, make_recipe):
    recipe = make_recipe("alignment", train={**TRAIN, "steps": 5000}, resources={**TWO, "step_timeout_s": 8})
    frozen = {}

    def freeze():
        frozen["since"] = time.monotonic()
        workers()[-1].send_signal(signal.SIGSTOP)

    join = at_step(recipe, 20, freeze)
    expected = "no step ended within resources.step_timeout_s=8: rank . does not answer"
    with pytest.raises(RecipeError, match=expected):
        run_on_ray(recipe)
    join()
    assert time.monotonic() - frozen["since"] < 90
    assert any(path.stat().st_size for path in (recipe.path / "hung").iterdir())


def test_a_node_that_is_to_go_leaves_a_checkpoint(nodes, make_recipe, tmp_path):
    """One that is drained, as a spot machine's is: no other checkpoint is due, and no failure is allowed for."""
    sections = {
        "train": {"steps": 900, "checkpoint_every": 10_000},
        "resources": {"cpus_per_worker": 1, "custom": {"trainer": 1}, "max_failures": 0},
    }
    whole = make_recipe("alignment", run_dir=str(tmp_path / "whole"), **sections)
    run_on_ray(whole)
    drained = make_recipe("alignment", run_dir=str(tmp_path / "drained"), **sections)

    def drain():
        first = workers()[0]
        by_raylet = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
        node, address = by_raylet[first.ppid()], ray.get_runtime_context().gcs_address
        reason = "--reason=DRAIN_NODE_REASON_PREEMPTION"
        chosen = [f"--node-id={node.node_id}", f"--address={address}", "--deadline-remaining-seconds=10"]
        command = [
            Path(sys.executable).with_name("ray"),
            "drain-node",
            reason,
            "--reason-message=spot",
            *chosen,
        ]
        subprocess.run(command, check=True, timeout=60)
        first.wait(timeout=60)
        (saved,) = complete_checkpoints(drained.path / "checkpoints")
        return saved

    join = at_step(drained, 20, drain)
    run_on_ray(drained)
    join()
    assert_same_weights(whole, drained)


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_ends_is_taken_up_by_the_same_command(make_recipe, tmp_path, signal_):
    """The driver, with a Ray of its own."""
    sections = {"train": TRAIN, "resources": {"cpus_per_worker": 1}}
    whole = make_recipe("alignment", run_dir=str(tmp_path / "whole"), **sections)
    ended = make_recipe("alignment", run_dir=str(tmp_path / "ended"), **sections)
    for recipe in (whole, ended):
        recipe.path.with_suffix(".yaml").write_text(recipe.to_yaml())
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["OMP_NUM_THREADS"] = (
        "1"  # as a worker with one CPU has: sums of two threads have other last bits
    )
    subprocess.run(
        [*COMMAND, str(whole.path.with_suffix(".yaml")), "--local"], check=True, timeout=200, env=environment
    )
    command = [*COMMAND, str(ended.path.with_suffix(".yaml"))]
    driver = subprocess.Popen(command, env=environment)
    try:
        join = at_step(ended, 35, lambda: driver.send_signal(signal_))
        code = driver.wait(timeout=200)
        join()
    finally:
        driver.kill()
    assert code == (75 if signal_ == signal.SIGTERM else -signal.SIGKILL)
    assert not (ended.path / "final").exists()
    subprocess.run(command, check=True, timeout=200, env=environment)
    assert_same_weights(whole, ended)
