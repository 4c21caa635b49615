"""The folder of a run, and where a checkpoint is when somebody names a run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINAL = "final"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
# A few words on long work before the first step, for whoever follows the run.
STATUS_FILE = "status.txt"


@dataclass(frozen=True)
class Run:
    """What observers and plugins are told about a run."""

    dir: Path
    stage: str
    recipe: dict[str, Any]

    @property
    def final(self) -> Path:
        """The finished checkpoint, in transformers' format; there only when the run is done."""
        return self.dir / FINAL


def is_finished(run_dir: str | Path) -> bool:
    return (Path(run_dir) / FINAL / "config.json").is_file()


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """What a finished run wrote down about itself. Raises FileNotFoundError where it has not finished."""
    return json.loads((Path(run_dir) / SUMMARY_FILE).read_text())


def resolve_checkpoint(path: str) -> str:
    """A checkpoint folder, a finished run's folder, or anything else (a hub id) as it is.

    Raises ValueError for a run that has not finished.
    """
    folder = Path(path)
    if (folder / FINAL / "config.json").is_file():
        return str(folder / FINAL)
    if (folder / RECIPE_FILE).is_file():
        raise ValueError(f"run {path!r} has not finished: resume it with `hovle train {folder / RECIPE_FILE}`")
    return path
