"""Real Ray: one worker equals the local loop, two equal one, a killed worker does not show, errors come through."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from textwrap import dedent

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.own_ray import have_ray_wait
from hovle_train.ray_trainer import RAY_ENVIRONMENT, RecipeError, run_local, run_on_ray
from hovle_train.runs import is_finished, read_summary
from hovle_train.runtime import Runtime


@pytest.fixture(scope="module")
def local_ray():
    """A cluster of two cores."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def final_weights(recipe):
    return load_file(recipe.path / "final" / "model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def curve(recipe, name="loss"):
    return [line[name] for line in read_metrics(recipe.path / "metrics.jsonl")]


def test_a_cluster_s_processes_are_left_alone():
    """Whoever calls it has no raylet of its own for a parent."""
    actor = psutil.Popen(["bash", "-c", "exec -a ray::SynchronizationActor sleep 60"])
    try:
        deadline = time.monotonic() + 20
        while actor.cmdline()[:1] != ["ray::SynchronizationActor"] and time.monotonic() < deadline:
            time.sleep(0.01)
        have_ray_wait([os.getpid()])
        assert os.sched_getscheduler(actor.pid) == os.SCHED_OTHER
    finally:
        actor.kill()
        actor.wait()


def test_a_ray_of_our_own_is_without_what_nobody_looks_at():
    """And it works: a task runs; and it ends with the process that started it, also what Ray itself leaves."""
    script = """
        import psutil, ray, subprocess
        from contextlib import suppress
        from hovle_train.ray_trainer import start_ray
        start_ray()
        assert ray.get(ray.remote(lambda: 2).remote()) == 2
        scripts = []
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # it has ended, or is a zombie
                scripts += child.cmdline()
        assert any(a.endswith("/raylet") for a in scripts), scripts
        assert not [a for a in scripts if a.endswith(("monitor.py", "dashboard.py"))]
        ray.get(ray.remote(lambda: subprocess.Popen(['sleep', '600'], start_new_session=True).pid).remote())
        print(*[child.pid for child in psutil.Process().children(recursive=True)])
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOVLE_DEBUG", "RAY_ADDRESS")
    }
    command = [sys.executable, "-c", dedent(script)]
    ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in ended.stdout.split()]
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert len(pids) > 2
    assert not psutil.wait_procs(left, timeout=30)[1]


def test_workers_that_this_machine_has_no_room_for_are_not_waited_for(local_ray, make_recipe):
    recipe = make_recipe("alignment", resources={"num_workers": 3})
    with pytest.raises(ValueError, match=r"no room for 3 workers .* CPU 1 each: this machine has CPU 2\."):
        run_on_ray(recipe)


def test_two_workers_equal_one_process(local_ray, make_recipe, tmp_path):
    """The same global batch on one process without Ray, and shared by two workers over gloo."""
    one = make_recipe("instruction_tuning", run_dir=str(tmp_path / "one"))
    run_local(one)
    two = make_recipe("instruction_tuning", run_dir=str(tmp_path / "two"), resources={"num_workers": 2})
    run_on_ray(two)
    assert read_summary(two.path)["num_workers"] == 2
    assert curve(two) == pytest.approx(curve(one), rel=1e-4)
    assert largest_difference(final_weights(one), final_weights(two)) < 1e-4


def test_what_of_ray_looks_after_the_worker_waits_for_it_and_nothing_else_does(local_ray, make_recipe):
    policies = {}

    def look():
        deadline = time.monotonic() + 100
        while not policies.get("ray::RayTrainWorker") and time.monotonic() < deadline:
            has_begun = bool(read_metrics(recipe.path / "metrics.jsonl"))
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error, OSError):
                    name = " ".join(process.cmdline())
                    found = [os.sched_getscheduler(thread.id) for thread in process.threads()]
                    # A title is padded, and "ray::Actor.method" while one runs.
                    title = name.split(".")[0].strip() if name.startswith("ray::") else process.name()
                    policies[title] = set(found)
            if not has_begun:
                policies.pop("ray::RayTrainWorker", None)
            time.sleep(0.2)

    recipe = make_recipe("alignment", train={"steps": 100, "checkpoint_every": 1000})
    watcher = threading.Thread(target=look)
    watcher.start()
    run_on_ray(recipe)
    watcher.join()
    for name in ("ray::SynchronizationActor", "ray::TrainController"):
        assert os.SCHED_IDLE in policies[name], sorted(policies)
    for name in ("ray::RayTrainWorker", "gcs_server", "raylet"):
        assert policies[name] == {os.SCHED_OTHER}, name
    assert not policies.keys() & {"ray::PlacementGroupCleaner", "ray::DatasetManager"}
    policy = ray.remote(lambda: os.sched_getscheduler(0))
    assert ray.get(policy.remote()) == os.SCHED_OTHER


@pytest.mark.slow
def test_steps_of_rows_go_on_with_another_number_of_workers(local_ray, make_recipe, plugins, tmp_path):
    """One process to the checkpoint behind step 1, two workers from there, with what waited in its packing windows."""
    train = {"global_batch_size": None, "global_batch_rows": 4}
    whole = make_recipe("alignment", run_dir=str(tmp_path / "whole"), train=train)
    run_local(whole)
    moved = make_recipe(
        "alignment", run_dir=str(tmp_path / "moved"), train=train, resources={"num_workers": 2}
    )
    trainer = Trainer(moved, plugins, Runtime())
    inner = trainer.step
    trainer.step = lambda step, batches: inner(step, batches) if step < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    run_on_ray(moved)
    assert read_summary(moved.path)["num_workers"] == 2
    assert curve(moved) == pytest.approx(curve(whole), rel=1e-4)
    assert curve(moved, "fill") == curve(whole, "fill")
    assert largest_difference(final_weights(whole), final_weights(moved)) < 1e-4


def kill_worker_at(recipe, step, killed):
    """SIGKILL this test's training worker once the run has logged `step`; its pid goes into `killed`."""
    deadline = time.monotonic() + 120
    while not killed and time.monotonic() < deadline:
        records = read_metrics(recipe.path / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # another one that ends just now
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
        time.sleep(0.02)


def test_a_killed_worker_resumes_to_the_same_weights(local_ray, make_recipe, tmp_path):
    """Killed on Ray, it ends with the very weights and curve of a run in this process that nothing disturbed."""
    train = {"steps": 200, "checkpoint_every": 10}
    whole = make_recipe("alignment", run_dir=str(tmp_path / "whole"), train=train)
    with one_thread():  # as the worker has
        run_local(whole)
    resources = {"num_workers": 1, "cpus_per_worker": 1}
    killed = make_recipe("alignment", run_dir=str(tmp_path / "killed"), train=train, resources=resources)
    torn = killed.path / "ray" / "alignment" / "checkpoint_manager_snapshot.json"
    torn.parent.mkdir(parents=True)
    torn.write_text('{"ray_version": "2.')  # of a start that was killed while Ray wrote it
    pids: list[int] = []
    killer = threading.Thread(target=kill_worker_at, args=(killed, 25, pids))
    killer.start()
    run_on_ray(killed)
    killer.join()
    assert len(pids) == 1
    assert is_finished(killed.path)
    assert [path.name for path in (killed.path / "ray").iterdir()] == ["alignment"], "its own is gone"
    assert largest_difference(final_weights(whole), final_weights(killed)) == 0
    assert curve(whole) == curve(killed)


def test_errors_that_no_restart_mends_come_through_at_once(local_ray, make_recipe):
    recipe = make_recipe("alignment", data={"sources": []}, resources={"max_failures": 3})
    with pytest.raises(RecipeError, match="data.sources is empty"):
        run_on_ray(recipe)
    assert json.loads((recipe.path / "error.json").read_text())["rank"] == 0
