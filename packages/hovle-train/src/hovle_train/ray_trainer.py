"""Runners: the loop on Ray Train, or in this process. Both call `Trainer.run`; Ray adds workers and restarts.

The loop, and transformers with it, is imported where it runs: Ray's controller reads this module, too, and every
stage would wait for that.
"""

import atexit
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hovle_core.openmp import SPINS
from hovle_core.plugins import load_plugins
from hovle_train.config import Recipe
from hovle_train.export import git_commit, write_json
from hovle_train.failure import Stopped, note_failure, stop_on_sigterm
from hovle_train.lineage import absolute
from hovle_train.own_ray import end_onlookers, have_ray_wait, own_ray, shut_down, without_onlookers
from hovle_train.room import check_room, cores_a_worker
from hovle_train.runs import is_finished
from hovle_train.runtime import Runtime

logger = logging.getLogger(__name__)

ERROR_FILE = "error.json"
# What the other ranks wait for rank 0 at most before the first step, while it hashes shards, measures a language gate
# or has a teacher look at all images. Of a step the watchdog takes care (`resources.step_timeout_s`).
PREPARATION_SECONDS = 24 * 3600


class RecipeError(ValueError):
    """A run that ended for a reason that no restart mends."""


# Ray reads these when it starts. The report queue holds one entry and is drained once an interval (2 s by default);
# the rest is noise that a run's own log replaces.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray makes its workers give way to everything else (niceness 15); here they are what the machine is for.
    "RAY_worker_niceness": "0",
}

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"

# The same for a Ray of this machine alone, which nobody watches: what its processes tell a dashboard that is not there
# takes cores from the step, and a step waits for the slower core.
LOCAL_ENVIRONMENT = {
    # It waits for a cluster to take nodes away; one process less to start a stage.
    WATCHER: "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",  # none
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


def check_local(recipe: Recipe) -> None:
    """Raise ValueError for a recipe that one process on this machine cannot run."""
    if recipe.resources.num_workers > 1:
        raise ValueError(
            f"resources.num_workers is {recipe.resources.num_workers}, but --local is one process"
        )
    if recipe.resources.teacher_pool is not None:
        raise ValueError("resources.teacher_pool needs Ray: leave out --local, or the pool")
    if recipe.resources.use_gpu and not torch.cuda.is_available():
        raise ValueError(
            "resources.use_gpu is true, and torch finds no GPU on this machine: leave it out, or leave out --local and "
            "have Ray find a node with one"
        )


def run_local(recipe: Recipe, asked: threading.Event | None = None) -> None:
    """Run a recipe in this process, without Ray, on one worker. Raises ValueError as `check_local` does, and Stopped
    as `run_on_ray`; SIGTERM sets `asked`, also behind the last step, where nothing is left to be stopped."""
    check_local(recipe)
    from hovle_train.loop import Trainer

    device = torch.device("cuda" if recipe.resources.use_gpu else "cpu")
    with stop_on_sigterm(recipe.path, asked or threading.Event()):
        # A watchdog ends this process, and no `except` hears of it.
        runtime = Runtime(device=device, give_up=partial(note_failure, recipe.path))
        Trainer(recipe, load_plugins(), runtime, commit=git_commit()).run()


def run_on_ray(recipe: Recipe, asked: threading.Event | None = None) -> None:
    """Run a recipe on the Ray cluster this process is connected to, or on a local one started for it.

    A worker that dies is restarted up to `resources.max_failures` times and resumes from the newest checkpoint in
    `run_dir`, which all workers must share. Raises ray.train's TrainingFailedError after that. What a restart cannot
    mend (a bad recipe, unreadable data, a full disk, a loss that is not finite, a rank that hangs) is not tried again,
    and raises RecipeError. Raises ValueError for workers that a Ray of our own has no room for. SIGTERM to this process
    sets `asked`, stops all workers behind a checkpoint or before the first step, and raises Stopped.
    """
    asked = asked or threading.Event()
    start_ray()
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = recipe.resources
    cpus = resources.cpus_per_worker or cores_a_worker(recipe, ray.nodes())
    labels: dict[str, Any] = {"label_selector": resources.labels} if resources.labels else {}
    # A step of one worker is all of the machine's; several, and teachers, are served by Ray while they compute.
    alone, own = resources.num_workers == 1 and resources.teacher_pool is None, own_ray()
    config = {
        "recipe": absolute(recipe).model_dump(mode="json"),
        "commit": git_commit(),
        "ray": own if alone else [],
    }
    attempt = secrets.token_hex(8)
    kept_by_ray = recipe.path.resolve() / "ray" / f"{recipe.stage.name}-{attempt}"
    pool: list[Any] = []
    trainer_class = without_onlookers(TorchTrainer) if own else TorchTrainer
    trainer = trainer_class(
        _worker,
        train_loop_config={**config, "attempt": attempt},
        torch_config=TorchConfig(
            backend="nccl" if resources.use_gpu else "gloo", timeout_s=PREPARATION_SECONDS
        ),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={
                "CPU": cpus,
                **({"GPU": 1} if resources.use_gpu else {}),
                **resources.custom,
            },
            accelerator_type=resources.accelerator_type,
            **labels,
        ),
        run_config=RunConfig(
            # Its own for each start: what Ray keeps there of an earlier one is not needed, and it may be torn.
            name=f"{recipe.stage.name}-{attempt}",
            storage_path=str(kept_by_ray.parent),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            # Ray shows type checkers the class of its older Train.
            worker_runtime_env={"env_vars": _waiting(resources.num_workers)},  # type: ignore[call-arg]
        ),
    )
    try:
        with stop_on_sigterm(recipe.path, asked, may_wait=True):
            check_room(recipe, cpus, is_own=bool(own))
            pool += _start_pool(recipe)
            trainer.fit()
    except SystemExit:  # Stopped, of which Ray's waiting leaves no more than that
        if asked.is_set():
            raise Stopped(recipe.path) from None
        raise
    finally:
        for teacher in pool:
            ray.kill(teacher)
        shutil.rmtree(kept_by_ray, ignore_errors=True)
        error = _read_error(recipe.path, attempt)
        if error is not None:
            raise RecipeError(error)
    if asked.is_set() and not is_finished(recipe.path):
        raise Stopped(recipe.path)


def _start_pool(recipe: Recipe) -> list[Any]:
    if recipe.resources.teacher_pool is None:
        return []
    from hovle_train.teacher_pool import start_pool  # imports torch's half of the packages

    return start_pool(absolute(recipe))


def _waiting(num_workers: int) -> dict[str, str]:
    """How a worker's idle OpenMP threads wait: a worker alone awake, several asleep, or they starve each other."""
    if num_workers == 1:
        return {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPINS)}
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def _is_losing_node() -> Callable[[], bool] | None:
    """How a worker hears that its cluster takes a node away; None where this Ray does not tell."""
    import ray.train

    look = getattr(ray.train, "get_preemption_info", None)  # newer than the oldest Ray that we take
    if look is None or os.environ.get(WATCHER, "1") == "0":
        return None
    return lambda: look() is not None


def start_ray() -> None:
    """Connect to `RAY_ADDRESS`, or start Ray on this machine without its dashboard; nothing if that is done already.

    Workers' own prints stay in Ray's logs: a run tells of itself through its folder. HOVLE_DEBUG=1 shows them.
    """
    address = os.environ.get("RAY_ADDRESS")
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    imported = sys.modules.get("ray")
    if imported is not None and imported.is_initialized():
        return
    if not address:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    import ray  # some of these it reads now

    debug = os.environ.get("HOVLE_DEBUG", "0") not in ("", "0")
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.INFO if debug else logging.ERROR,
            log_to_driver=debug,
        )
    except SystemExit:  # what Ray makes of a SIGTERM meanwhile
        if main and callable(before):
            before(signal.SIGTERM, None)
        raise
    if main and callable(before):  # Ray's own ends with code 15
        signal.signal(signal.SIGTERM, before)
    if not address:
        atexit.register(shut_down)
        if not debug:
            end_onlookers()
    logging.getLogger("ray.train").setLevel(logging.INFO if debug else logging.WARNING)


def _worker(config: dict[str, Any]) -> None:
    """The function that Ray Train calls on every worker."""
    import ray.train
    from ray.train import Checkpoint
    from ray.train.torch import get_device

    from hovle_train.loop import Trainer

    context = ray.train.get_context()

    def report(metrics: dict[str, Any], path: Path | None) -> None:
        have_ray_wait(config["ray"])  # what has started since
        if path is None:
            ray.train.report(metrics)
            return
        # The files are where they belong already: Ray gets a pointer to them and copies nothing large.
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "pointer.json").write_text(json.dumps({**metrics, "path": str(path)}))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = Recipe.model_validate(config["recipe"])
    if _read_error(recipe.path, config["attempt"]) is not None:
        return  # this attempt failed for good: a restart has nothing to add
    rank = context.get_world_rank()

    def give_up(message: str) -> None:
        content = {"attempt": config["attempt"], "rank": rank, "error": message}
        write_json(recipe.path / ERROR_FILE, content)

    runtime = Runtime(rank, context.get_world_size(), get_device(), report, give_up, _is_losing_node())
    have_ray_wait(config["ray"])
    try:
        Trainer(recipe, load_plugins(), runtime, commit=config["commit"]).run()
    except Stopped as stopped:
        logger.info("%s", stopped)  # whoever asked knows what to do
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if runtime.is_torn_down:
            raise  # another rank or its node died, and this is what a step says to that: Ray tries again
        give_up(f"{type(error).__name__}: {error}")
        logger.exception("not tried again")
        if runtime.world_size > 1:
            raise  # ends the other ranks, which wait for this one


def _read_error(run_dir: Path, attempt: str) -> str | None:
    """What ended this attempt for good, if anything did."""
    path = run_dir / ERROR_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    return content["error"] if content["attempt"] == attempt else None
