"""Where a checkpoint is when somebody names a run. Reads folders only: who trains and who serves both need it."""

from __future__ import annotations

import json
import re
from pathlib import Path

FINAL = "final"
RECIPE_FILE = "recipe.yaml"
#: In a checkpoint that a run of ours made: what made it.
RUN_CARD = "hovle_run.json"
#: The stages that leave a HoVLE behind, the last one first.
STAGES = ("instruction_tuning", "alignment", "distillation")

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_finished(run_dir: str | Path) -> bool:
    return (Path(run_dir) / FINAL / "config.json").is_file()


def resolve_checkpoint(path: str) -> str:
    """A checkpoint folder, a finished run's folder (gives its `final/`), or anything else (a hub id) as it is.

    Raises ValueError for a run that has not finished.
    """
    if is_finished(path):
        return str(Path(path) / FINAL)
    if (Path(path) / RECIPE_FILE).is_file():
        raise ValueError(f"run {path!r} has not finished: resume it with {_resume(Path(path))}")
    return path


def plugins_of(checkpoint: str | Path) -> dict[str, str]:
    """Plugin -> version, as the run that made a checkpoint wrote them beside it; empty where no run of ours did."""
    card = Path(checkpoint) / RUN_CARD
    try:
        plugins = json.loads(card.read_bytes()).get("plugins", {})
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{card} is not what a run writes: {error}") from error
    return {str(name): str(version) for name, version in dict(plugins).items()}


def latest_checkpoint(path: str) -> str:
    """As `resolve_checkpoint`, and a folder of one run a stage gives the last stage of `STAGES` that has finished.

    A folder or a hub id comes back. Raises ValueError for a folder that holds neither a checkpoint nor a finished
    run, and for a path where there is nothing; both say what to do.
    """
    folder = Path(path)
    if not folder.exists():
        # "runs/demo" could be a hub id as well: it is a typing error where "runs" is a folder here.
        if _HUB_ID.fullmatch(path) and not ("/" in path and folder.parent.is_dir()):
            return path
        raise ValueError(
            f"no such folder: {path!r} (give a checkpoint, a run, or a hub id such as OpenGVLab/HoVLE)"
        )
    if not folder.is_dir():
        raise ValueError(f"{path!r} is a file; give the folder of a checkpoint or of a run")
    resolved = resolve_checkpoint(path)
    if (Path(resolved) / "config.json").is_file():
        return resolved
    for stage in STAGES:
        if is_finished(folder / stage):
            return str(folder / stage / FINAL)
    started = [folder / stage for stage in STAGES if (folder / stage / RECIPE_FILE).is_file()]
    if started:
        raise ValueError(
            f"no stage of {path!r} has finished: resume {started[0].name} with {_resume(started[0])}"
        )
    raise ValueError(
        f"{path!r} is neither a checkpoint (no config.json) nor a run (no {RECIPE_FILE}), "
        f"and holds no run of a stage ({', '.join(STAGES)})"
    )


def _resume(run_dir: Path) -> str:
    return f"`hovle train {run_dir / RECIPE_FILE}`"
