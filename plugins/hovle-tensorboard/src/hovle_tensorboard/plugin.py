"""Observer hooks. Installed, it writes for every run; HOVLE_PLUGINS leaves it out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hovle_core.hookspecs import hookimpl

HOVLE_HOOK_API = 1


def check_observer_settings(settings: Any) -> None:
    """Raise ValueError for anything under `observers.tensorboard`: there is nothing to set."""
    if settings:
        raise ValueError(
            f"observers.tensorboard is {settings!r}, and it has no settings: leave it out (HOVLE_PLUGINS names the "
            "plugins to load, should it not write)"
        )


@hookimpl
def hovle_on_log(run: Any, step: int, metrics: Mapping[str, float]) -> None:
    from hovle_tensorboard.events import write

    write(run.dir, step, metrics)


@hookimpl
def hovle_on_checkpoint(run: Any, step: int, path: Path) -> None:
    from hovle_tensorboard.events import close

    if path == run.final:
        close(run.dir)
