"""W&B as an observer of runs, through the same hook as anyone's. Offline unless a recipe says otherwise."""

import hashlib
from collections.abc import Mapping
from typing import Any

from hovle_train.runs import Run


def log_to_wandb(run: Run, step: int, metrics: Mapping[str, Any]) -> None:
    """Log to the run's W&B run, starting it on the first call; a resumed run continues the same one."""
    settings = run.recipe["observers"]
    if settings["wandb"] == "disabled":
        return
    import wandb

    if wandb.run is None or wandb.run.id != _id(run):
        if wandb.run is not None:
            wandb.finish()
        wandb.init(
            project=settings["project"],
            name=run.dir.name,
            id=_id(run),
            resume="allow",
            mode=settings["wandb"],
            dir=str(run.dir),
            config=run.recipe,
            settings=wandb.Settings(silent=True, console="off"),
        )
    wandb.log(dict(metrics), step=step)


def finish_wandb(run: Run) -> None:
    """Close the run's W&B run, if this process has it open."""
    if run.recipe["observers"]["wandb"] == "disabled":
        return
    import wandb

    if wandb.run is not None and wandb.run.id == _id(run):
        wandb.finish()


def _id(run: Run) -> str:
    return hashlib.sha256(str(run.dir.resolve()).encode()).hexdigest()[:12]
