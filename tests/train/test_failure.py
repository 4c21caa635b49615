"""Early ends of a run: each says what happened and leaves nothing torn, and the same command goes on to the same
weights."""

import json
import os
import resource
import signal
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from hovle_core.cli import main
from hovle_train import checkpoint, failure, lock
from hovle_train.failure import DiskFull, NonFiniteError, place_of
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.ray_trainer import run_local
from hovle_train.runs import FAILED_FILE, is_finished, write_text
from hovle_train.runtime import Runtime


@pytest.fixture
def whole(make_recipe, plugins, tmp_path):
    """The weights of six uninterrupted steps."""
    recipe = make_recipe("alignment", run_dir=str(tmp_path / "whole"))
    Trainer(recipe, plugins, Runtime()).run()
    return final_weights(recipe)


def final_weights(recipe):
    return load_file(recipe.path / "final" / "model.safetensors")


def assert_same(recipe, whole):
    assert all(torch.equal(tensor, whole[name]) for name, tensor in final_weights(recipe).items())


def assert_goes_on(recipe, plugins, whole):
    Trainer(recipe, plugins, Runtime()).run()
    assert_same(recipe, whole)


def stopped_at(recipe, plugins, stop):
    """A trainer whose `stop(step)` is called before each step."""
    trainer = Trainer(recipe, plugins, Runtime())
    inner = trainer.step

    def step(number, batches):
        stop(number)
        return inner(number, batches)

    trainer.step = step
    return trainer


@pytest.fixture
def no_harm():
    """A SIGTERM that comes too late does not end the tests."""

    def ignore(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, ignore)
    yield ignore
    signal.signal(signal.SIGTERM, before)


def test_sigterm_stops_behind_a_checkpoint_with_a_code_of_its_own(
    make_recipe, plugins, tmp_path, capsys, no_harm
):
    train = {"steps": 40, "checkpoint_every": 100}
    whole, stopped = (
        make_recipe("alignment", run_dir=str(tmp_path / name), train=train) for name in ("whole", "stopped")
    )
    Trainer(whole, plugins, Runtime()).run()
    path = tmp_path / "recipe.yaml"
    path.write_text(stopped.to_yaml())

    def ask():
        deadline = time.monotonic() + 60
        while not read_metrics(stopped.path / "metrics.jsonl") and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=ask)
    killer.start()
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(path), "--local"])
    killer.join()
    assert exit_.value.code == failure.EXIT_STOPPED == 75
    assert "stopped as asked" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is no_harm
    (kept,) = checkpoint.complete_checkpoints(stopped.path / "checkpoints")
    assert checkpoint.read_state(kept)["step"] < 39
    assert main(["train", str(path), "--local"]) == 0
    assert_same(stopped, final_weights(whole))


def be_asked(seconds=10):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)


def test_sigterm_before_a_run_ends_the_command_with_the_same_code(no_harm):
    with pytest.raises(SystemExit) as exit_, failure.ending_with_75():
        be_asked()
    assert exit_.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is no_harm


@pytest.mark.parametrize("sign", [None, "lock", "recipe"])
def test_sigterm_is_not_waited_for_where_no_worker_has_begun(tmp_path, no_harm, sign, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("of an earlier start")
    asked = threading.Event()
    with failure.stop_on_sigterm(tmp_path, asked, may_wait=True), ExitStack() as worker:
        if sign == "lock":
            worker.enter_context(lock.alone_in(tmp_path))
        elif sign == "recipe":
            write_text(tmp_path / "recipe.yaml", "of this one")
        if sign is not None:
            be_asked(0.1)
            be_asked(0.1)  # as good as the same
            assert asked.is_set()
            monkeypatch.setattr(failure, "AGAIN_SECONDS", 0)
        with pytest.raises(failure.Stopped):  # asked twice, it is not waited for either
            be_asked()


@pytest.mark.parametrize(
    ("stage", "options", "doing"),
    [
        ("distillation", {"teacher": {"name": "grid"}, "cache_features": True}, "_progress"),
        ("alignment", None, "prepare"),
    ],
)
def test_sigterm_while_a_run_is_prepared_stops_it_there(
    stage, options, doing, make_recipe, plugins, no_harm, monkeypatch
):
    recipe = make_recipe(stage, options=options, train={"steps": 2})
    inner = getattr(Trainer, doing)

    def be_asked(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        inner(*args)

    with monkeypatch.context() as patched, failure.stop_on_sigterm(recipe.path, threading.Event()):
        patched.setattr(Trainer, doing, be_asked)
        with pytest.raises(failure.Stopped, match="stopped as asked"):
            Trainer(recipe, plugins, Runtime()).run()
    assert not (recipe.path / "metrics.jsonl").exists()
    assert not (recipe.path / "checkpoints").exists()
    if doing == "_progress":  # not all features were waited for
        assert not (recipe.path / "teacher_features" / "index.json").exists()
    Trainer(recipe, plugins, Runtime()).run()
    assert is_finished(recipe.path)


@pytest.mark.parametrize("damage", ["another byte", "cut", "no state", "another step"])
def test_the_checkpoint_before_a_damaged_one_is_used(make_recipe, plugins, whole, caplog, damage):
    recipe = make_recipe("alignment")
    with pytest.raises(ZeroDivisionError):
        stopped_at(recipe, plugins, lambda step: 1 / (step - 5)).run()
    first, last = checkpoint.complete_checkpoints(recipe.path / "checkpoints")
    content = bytearray((last / checkpoint.OPTIMIZER).read_bytes())
    content[-1] ^= 1
    if damage == "another byte":
        (last / checkpoint.OPTIMIZER).write_bytes(content)
    elif damage == "cut":
        (last / checkpoint.OPTIMIZER).write_bytes(content[:-100])
    elif damage == "another step":
        state = (last / checkpoint.STATE).read_text()
        assert '"step": 3,' in state
        (last / checkpoint.STATE).write_text(state.replace('"step": 3,', '"step": 4,'))
    else:
        (last / checkpoint.STATE).unlink()
    assert checkpoint.newest(recipe.path / "checkpoints") == first
    assert f"{last} is {'damaged' if damage.startswith('another') else 'torn'}" in caplog.text
    assert_goes_on(recipe, plugins, whole)


def test_a_run_dir_has_room_for_one_process(make_recipe, plugins, monkeypatch):
    """And for the next one, once that has ended."""
    recipe = make_recipe("alignment", train={"steps": 2})
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.2)
    with lock.alone_in(recipe.path), pytest.raises(ValueError, match=r"another process trains in .*run"):
        Trainer(recipe, plugins, Runtime()).run()
    assert not (recipe.path / "metrics.jsonl").exists()
    Trainer(recipe, plugins, Runtime()).run()
    assert (recipe.path / "final").is_dir()


def test_a_full_disk_is_a_clear_error_with_nothing_torn(make_recipe, plugins, whole):
    """A limit on the size of files stands for the disk: the kernel refuses the write either way."""
    recipe = make_recipe("alignment")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(DiskFull, match=r"no room for the run's files in .*MiB free.*make room"):
            stopped_at(recipe, plugins, fill).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (kept,) = (recipe.path / "checkpoints").iterdir()  # nor is there a temporary folder
    assert checkpoint.newest(recipe.path / "checkpoints") == kept
    assert checkpoint.read_state(kept)["step"] == 1
    assert_goes_on(recipe, plugins, whole)


def test_numbers_that_are_not_finite_stop_before_the_update_and_name_the_samples(make_recipe, plugins):
    one_row = {"micro_batch_tokens": 1024, "min_fill": 0}
    recipe = make_recipe("alignment", train=one_row)
    trainer = Trainer(recipe, plugins, Runtime())
    inner, calls = trainer.stage.loss, []

    def loss(module, batch, totals):
        calls.append((batch.keys, {name: p.detach().clone() for name, p in module.named_parameters()}))
        value, logged = inner(module, batch, totals)
        return value * (float("nan") if len(calls) == 3 else 1), logged

    trainer.stage.loss = loss
    with pytest.raises(NonFiniteError, match="step 2: loss or gradient is not finite"):
        trainer.run()
    content = json.loads((recipe.path / "nonfinite.json").read_text())
    keys, weights = calls[-1]
    assert (content["step"], content["gradient_norm"]) == (2, "nan")
    assert [(rank["rank"], rank["keys"]) for rank in content["ranks"]] == [(0, keys)]
    assert all(torch.equal(p, weights[name]) for name, p in trainer.module.named_parameters())


def test_a_hung_rank_ends_the_run_with_its_stack(make_recipe, plugins, monkeypatch):
    recipe = make_recipe("alignment", resources={"step_timeout_s": 3})
    ended, told = threading.Event(), []

    def leave(code):
        told.append(code)
        ended.set()
        time.sleep(3600)  # a daemon thread, as the real one would not return either

    def hang_here(step):
        if step == 0:
            assert ended.wait(30)
            raise InterruptedError

    monkeypatch.setattr(failure.os, "_exit", leave)
    trainer = stopped_at(recipe, plugins, hang_here)
    trainer.runtime.give_up = told.append
    with pytest.raises(InterruptedError):
        trainer.run()
    message, code = told
    assert code == 2
    assert "no step ended within resources.step_timeout_s=3: rank 0 is in" in message
    assert " in hang_here" in (recipe.path / "hung" / "rank-0.txt").read_text()


def test_a_run_without_ray_leaves_what_its_watchdog_says(make_recipe, monkeypatch):
    """The watchdog ends the process behind it."""
    recipe = make_recipe("alignment")
    monkeypatch.setattr(Trainer, "run", lambda trainer: trainer.runtime.give_up("no step ended"))
    run_local(recipe)
    assert (recipe.path / FAILED_FILE).read_text() == "no step ended"


def test_a_rank_that_waits_for_others_is_not_the_one_that_hangs():
    frames = '  File "/x/hovle_train/loop.py", line 150 in step\n'
    waits = (
        'Thread 0x1 (most recent call first):\n  File "/x/torch/distributed/c10d.py", line 9 in all_reduce\n'
    )
    other = 'Thread 0x2 (most recent call first):\n  File "/x/threading.py", line 5 in wait\n'
    reads = 'Thread 0x3 (most recent call first):\n  File "/x/queue.py", line 7 in get\n'
    assert place_of(f"Timeout!\n{other}\n{waits}{frames}") is None
    assert place_of(f"Timeout!\n{other}\n{reads}{frames}") == "/x/queue.py:7 in get"
    assert place_of(other) is None
    # Who waits for data hangs where its reader does; a reader with threads waits for them.
    waits = f'{reads}  File "/x/hovle_data/pipeline.py", line 1 in __next__\n{frames}'
    pool = (
        'Thread 0x4 (most recent call first):\n  File "/x/threading.py", line 5 in wait\n'
        '  File "/x/concurrent/futures/_base.py", line 6 in result\n'
        '  File "/x/hovle_data/pipeline.py", line 2 in _run\n'
    )
    nfs = (
        'Thread 0x5 (most recent call first):\n  File "/x/io.py", line 8 in read\n'
        '  File "/x/hovle_data/tars.py", line 3 in get\n'
    )
    assert place_of(f"Timeout!\n{other}\n{waits}\n{nfs}") == "/x/io.py:8 in read"
    assert place_of(f"Timeout!\n{pool}\n{waits}\n{nfs}") == "/x/io.py:8 in read"


def test_a_run_that_ends_well_leaves_no_stacks(make_recipe, plugins, whole, tmp_path):
    assert not (tmp_path / "whole" / "hung").exists()


def test_a_rank_knows_that_its_group_was_torn_down():
    """What a step raises then is no fault of the recipe's, and Ray should try again."""
    assert not Runtime().is_torn_down
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert not Runtime(world_size=2).is_torn_down
    finally:
        torch.distributed.destroy_process_group()
    runtime = Runtime(world_size=2)
    with pytest.raises(ValueError, match="process group"):  # the error that would else be final
        runtime.sum({"targets": 1.0})
    assert runtime.is_torn_down
