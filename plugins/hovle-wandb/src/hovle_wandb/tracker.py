"""One W&B run for each run of ours, started with its first metrics and finished with its last checkpoint."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from hovle_core.registry import did_you_mean

MODES = ("offline", "online", "disabled")
DEFAULTS = {"mode": "offline", "project": "hovle"}


def settings(run: Any) -> dict[str, Any]:
    """`observers.wandb` of the run's recipe; a mode that it does not give is `WANDB_MODE`'s, or offline.

    Raises ValueError for a field or a mode that does not exist.
    """
    given = checked(run.recipe.get("observers", {}).get("wandb"))
    merged: dict[str, Any] = {**DEFAULTS, **given}
    if "mode" not in given and (mode := os.environ.get("WANDB_MODE")):
        merged["mode"] = mode
    _check_mode(merged["mode"])
    return merged


def checked(given: Any) -> dict[str, Any]:
    """`observers.wandb` as a mapping. Raises ValueError for a field or a mode that does not exist."""
    given = given or {}
    if isinstance(given, str):  # `wandb: disabled`
        given = {"mode": given}
    if not isinstance(given, dict):
        raise ValueError(f"observers.wandb is {given!r}: give a mode, or some of {', '.join(DEFAULTS)}")
    for name in given:
        if name not in DEFAULTS:
            raise ValueError(
                f"observers.wandb has no {name!r}{did_you_mean(name, DEFAULTS)} (it has {', '.join(DEFAULTS)})"
            )
    _check_mode(given.get("mode", DEFAULTS["mode"]))
    return given


def _check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"observers.wandb.mode is {mode!r}: give one of {', '.join(MODES)}")


def log(run: Any, step: int, metrics: Mapping[str, Any]) -> None:
    """Log to the run's W&B run, starting it on the first call; a resumed run continues the same one."""
    chosen = settings(run)
    if chosen["mode"] == "disabled":
        return
    import wandb

    if wandb.run is None or wandb.run.id != _id(run):
        if wandb.run is not None:
            wandb.finish()
        wandb.init(
            project=chosen["project"],
            name=run.dir.name,
            id=_id(run),
            resume="allow",
            mode=chosen["mode"],
            dir=str(run.dir),
            config=run.recipe,
            settings=wandb.Settings(silent=True, console="off"),
        )
    wandb.log(dict(metrics), step=step)


def finish(run: Any) -> None:
    """Close the run's W&B run, if this process has it open."""
    if settings(run)["mode"] == "disabled":
        return
    import wandb

    if wandb.run is not None and wandb.run.id == _id(run):
        wandb.finish()


def _id(run: Any) -> str:
    return hashlib.sha256(str(run.dir.resolve()).encode()).hexdigest()[:12]
