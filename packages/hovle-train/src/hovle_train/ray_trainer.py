"""Runners: the loop on Ray Train, or in this process. Both call `Trainer.run`; Ray adds workers and restarts."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from hovle_core.plugins import load_plugins
from hovle_train.config import Recipe
from hovle_train.loop import Trainer
from hovle_train.runtime import Runtime

logger = logging.getLogger(__name__)

# Ray reads these when it starts. The report queue holds one entry and is drained once an interval (2 s by default);
# the rest is noise that a run's own log replaces.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def run_local(recipe: Recipe) -> None:
    """Run a recipe in this process, without Ray, on one worker."""
    device = torch.device("cuda" if recipe.resources.use_gpu else "cpu")
    Trainer(recipe, load_plugins(), Runtime(device=device)).run()


def run_on_ray(recipe: Recipe) -> None:
    """Run a recipe on the Ray cluster this process is connected to, or on a local one started for it.

    A worker that dies is restarted up to `resources.max_failures` times and resumes from the newest checkpoint in
    `run_dir`, which all workers must share. Raises ray.train's TrainingFailedError after that.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    if not ray.is_initialized():
        start_ray()
    resources = recipe.resources
    cpus = resources.cpus_per_worker or max(1, int(ray.cluster_resources().get("CPU", 1)) // resources.num_workers)
    storage = recipe.path.resolve() / "ray"
    TorchTrainer(
        _worker,
        train_loop_config={"recipe": _absolute(recipe).model_dump(mode="json")},
        torch_config=TorchConfig(backend="nccl" if resources.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if resources.use_gpu else {})},
            accelerator_type=resources.accelerator_type,
        ),
        run_config=RunConfig(
            name=recipe.stage.name,
            storage_path=str(storage),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    ).fit()


def start_ray() -> None:
    """Connect to `RAY_ADDRESS`, or start Ray on this machine without its dashboard."""
    import ray

    address = os.environ.get("RAY_ADDRESS")
    ray.init(address=address, include_dashboard=None if address else False, logging_level=logging.WARNING)


def _absolute(recipe: Recipe) -> Recipe:
    """Workers have another working directory: paths must not depend on it."""
    recipe = recipe.model_copy(deep=True)
    recipe.run_dir = str(recipe.path.resolve())
    for source in [*recipe.data.sources, *recipe.data.images, *recipe.data.texts]:
        source.path = _absolute_if_local(source.path)
    model = recipe.model
    if model.init_from is not None:
        model.init_from = _absolute_if_local(model.init_from)
    for named in (model.backbone, model.tokenizer, recipe.stage.options.get("teacher")):
        options = named.options if hasattr(named, "options") else (named or {}).get("options", {})
        if isinstance(options.get("path"), str):
            options["path"] = _absolute_if_local(options["path"])
    return recipe


def _absolute_if_local(path: str) -> str:
    return str(Path(path).resolve()) if "://" not in path and Path(path).exists() else path


def _worker(config: dict[str, Any]) -> None:
    """The function that Ray Train calls on every worker."""
    import ray.train
    from ray.train import Checkpoint
    from ray.train.torch import get_device

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
    runtime = Runtime(context.get_world_rank(), context.get_world_size(), get_device(), report)
    Trainer(recipe, load_plugins(), runtime).run()
