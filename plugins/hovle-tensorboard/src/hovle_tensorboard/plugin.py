"""Observer hooks. Installed, it writes for every run; HOVLE_PLUGINS leaves it out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hovle_core.hookspecs import hookimpl

HOVLE_HOOK_API = 1


@hookimpl
def hovle_on_log(run: Any, step: int, metrics: Mapping[str, float]) -> None:
    from hovle_tensorboard.events import write

    write(run.dir, step, metrics)


@hookimpl
def hovle_on_checkpoint(run: Any, step: int, path: Path) -> None:
    from hovle_tensorboard.events import close

    if path == run.final:
        close(run.dir)
