"""Observer hooks. Installed, it logs every run; `WANDB_MODE=disabled` or HOVLE_PLUGINS leaves it out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hovle_core.hookspecs import hookimpl

HOVLE_HOOK_API = 1


def check_observer_settings(settings: Any) -> None:
    """Raise ValueError for `observers.wandb` with a field or a mode that does not exist."""
    from hovle_wandb.tracker import checked

    checked(settings)


@hookimpl
def hovle_on_log(run: Any, step: int, metrics: Mapping[str, float]) -> None:
    from hovle_wandb.tracker import log

    log(run, step, metrics)


@hookimpl
def hovle_on_checkpoint(run: Any, step: int, path: Path) -> None:
    from hovle_wandb.tracker import finish

    if path == run.final:
        finish(run)
