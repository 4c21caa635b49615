"""Runners: the loop on Ray Train, or in this process. Both call `Trainer.run`; Ray adds workers and restarts.

The loop, and transformers with it, is imported where it runs: Ray's controller reads this module, too, and every
stage would wait for that.
"""

import json
import logging
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import torch

from hovle_core.plugins import load_plugins
from hovle_train.config import Recipe
from hovle_train.export import git_commit, write_json
from hovle_train.lineage import absolute
from hovle_train.runtime import Runtime

logger = logging.getLogger(__name__)

ERROR_FILE = "error.json"


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


# Iterations that an idle OpenMP thread waits awake, about 5 ms: longer than the gaps between a step's operations, whose
# wake-ups cost more than many an operation itself, and short beside what another process would have to wait.
SPINS = "100000"


def run_local(recipe: Recipe) -> None:
    """Run a recipe in this process, without Ray, on one worker. Raises ValueError for a recipe of several."""
    if recipe.resources.num_workers > 1:
        raise ValueError(
            f"resources.num_workers is {recipe.resources.num_workers}, but --local is one process"
        )
    from hovle_train.loop import Trainer

    device = torch.device("cuda" if recipe.resources.use_gpu else "cpu")
    Trainer(recipe, load_plugins(), Runtime(device=device), commit=git_commit()).run()


def run_on_ray(recipe: Recipe) -> None:
    """Run a recipe on the Ray cluster this process is connected to, or on a local one started for it.

    A worker that dies is restarted up to `resources.max_failures` times and resumes from the newest checkpoint in
    `run_dir`, which all workers must share. Raises ray.train's TrainingFailedError after that. What a restart cannot
    mend (a bad recipe, unreadable data, a loss that is not finite) is not tried again, and raises RecipeError.
    """
    start_ray()
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = recipe.resources
    cpus = resources.cpus_per_worker or max(
        1, int(ray.cluster_resources().get("CPU", 1)) // resources.num_workers
    )
    config = {"recipe": absolute(recipe).model_dump(mode="json"), "commit": git_commit()}
    attempt = secrets.token_hex(8)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={**config, "attempt": attempt},
        torch_config=TorchConfig(backend="nccl" if resources.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if resources.use_gpu else {})},
            accelerator_type=resources.accelerator_type,
        ),
        run_config=RunConfig(
            name=recipe.stage.name,
            storage_path=str(recipe.path.resolve() / "ray"),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            # Ray shows type checkers the class of its older Train.
            worker_runtime_env={"env_vars": _waiting(resources.num_workers)},  # type: ignore[call-arg]
        ),
    )
    try:
        trainer.fit()
    finally:
        error = _read_error(recipe.path, attempt)
        if error is not None:
            raise RecipeError(error)


def _waiting(num_workers: int) -> dict[str, str]:
    """How a worker's idle OpenMP threads wait: a worker alone awake, several asleep, or they starve each other."""
    if num_workers == 1:
        return {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPINS)}
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def start_ray() -> None:
    """Connect to `RAY_ADDRESS`, or start Ray on this machine without its dashboard; nothing if that is done already.

    Workers' own prints stay in Ray's logs: a run tells of itself through its folder. HOVLE_DEBUG=1 shows them.
    """
    address = os.environ.get("RAY_ADDRESS")
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not address:
        # It waits for a cluster to take nodes away; this is one machine, and one process less to start a stage.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    if ray.is_initialized():
        return
    debug = os.environ.get("HOVLE_DEBUG", "0") not in ("", "0")
    ray.init(
        address=address or "local",
        include_dashboard=None if address else False,
        logging_level=logging.INFO if debug else logging.ERROR,
        log_to_driver=debug,
    )
    logging.getLogger("ray.train").setLevel(logging.INFO if debug else logging.WARNING)


def _worker(config: dict[str, Any]) -> None:
    """The function that Ray Train calls on every worker."""
    import ray.train
    from ray.train import Checkpoint
    from ray.train.torch import get_device

    from hovle_train.loop import Trainer

    context = ray.train.get_context()

    def report(metrics: dict[str, Any], path: Path | None) -> None:
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
    runtime = Runtime(context.get_world_rank(), context.get_world_size(), get_device(), report)
    try:
        Trainer(recipe, load_plugins(), runtime, commit=config["commit"]).run()
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        content = {
            "attempt": config["attempt"],
            "rank": runtime.rank,
            "error": f"{type(error).__name__}: {error}",
        }
        write_json(recipe.path / ERROR_FILE, content)
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
