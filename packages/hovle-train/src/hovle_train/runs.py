"""The folder of a run: what lies where in it."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hovle_core.runs import FINAL, RECIPE_FILE, RUN_CARD, is_finished, resolve_checkpoint

__all__ = [
    "CHECKPOINTS",
    "FAILED_FILE",
    "FINAL",
    "FINAL_EMA",
    "LANGUAGE_FILE",
    "METRICS_FILE",
    "PIPELINE_FILE",
    "RECIPE_FILE",
    "REJECTED",
    "RUN_CARD",
    "STATUS_FILE",
    "SUMMARY_FILE",
    "Run",
    "is_finished",
    "read_summary",
    "remove_leftovers",
    "resolve_checkpoint",
    "write_text",
]

CHECKPOINTS = "checkpoints"
# What ended the newest start before its time, in words; the next one that trains drops it.
FAILED_FILE = "failed.txt"
# Perplexity of what the stage started from, and where a checkpoint goes that it keeps from being `FINAL`; in it, under
# its own name, the average.
LANGUAGE_FILE, REJECTED = "language.json", "rejected"
METRICS_FILE = "metrics.jsonl"
# In the folder that holds the runs of a pipeline: the resolved pipeline.
PIPELINE_FILE = "pipeline.yaml"
SUMMARY_FILE = "summary.json"
# The average of the weights, where a recipe wants it beside them.
FINAL_EMA = "final_ema"
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


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """What a finished run wrote down about itself. Raises FileNotFoundError where it has not finished."""
    return json.loads((Path(run_dir) / SUMMARY_FILE).read_text())


def write_text(path: Path, text: str) -> None:
    """Atomically replace a file."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:  # of a full disk, too
        temporary.unlink(missing_ok=True)


def remove_leftovers(run_dir: Path) -> None:
    """Drop what a killed process was about to write: checkpoints under the names that they have until they are whole,
    each as large as the weights. Only who writes here may call it, and before it does."""
    for pattern in (f".{FINAL}-*", ".fetching-*", f"{CHECKPOINTS}/.writing-*", f"{CHECKPOINTS}/.fetching-*"):
        for path in run_dir.glob(pattern):
            shutil.rmtree(path)
