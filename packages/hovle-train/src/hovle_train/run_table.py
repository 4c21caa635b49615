"""What runs tell of themselves, read from their folders: how far they are, what made them, and where they came from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hovle_train.lock import is_running
from hovle_train.metrics import read_metrics
from hovle_train.runs import (
    CHECKPOINTS,
    FAILED_FILE,
    FINAL,
    METRICS_FILE,
    PIPELINE_FILE,
    RECIPE_FILE,
    REJECTED,
    RUN_CARD,
    is_finished,
)

# What is shown of a step, where a stage logs it.
SHOWN = ("loss", "image_cosine", "text_cosine")


@dataclass(frozen=True)
class RunInfo:
    """One run's folder, or the finished checkpoint of one, read when asked for."""

    path: Path

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """{} for one that cannot be read."""
        try:
            recipe = yaml.safe_load((self.path / RECIPE_FILE).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        try:
            steps, name = recipe["train"]["steps"], recipe["stage"]["name"]
        except (KeyError, TypeError):
            return {}
        return recipe if isinstance(steps, int) and isinstance(name, str) else {}

    @cached_property
    def card(self) -> dict[str, Any]:
        """What was written into the finished checkpoint, or into the newest one of a run under way; {} before it, and
        where it cannot be read."""
        states = sorted((self.path / CHECKPOINTS).glob("step-*/state.json"))
        path = states[-1] if states else None
        if is_finished(self.path) or self.is_rejected:
            path = self.path / (FINAL if is_finished(self.path) else REJECTED) / RUN_CARD
        try:
            card = json.loads(path.read_bytes()) if path is not None else {}
        except (OSError, ValueError):
            return {}
        if not isinstance(card, dict):
            return {}
        shapes = {"plugins": dict, "data_manifest": dict, "tokens": int, "seconds": int | float}
        return {key: value for key, value in card.items() if isinstance(value, shapes.get(key, object))}

    @property
    def is_rejected(self) -> bool:
        """Whether the language gate keeps its checkpoint from being the finished one."""
        return (self.path / REJECTED / RUN_CARD).is_file()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path / METRICS_FILE)

    @property
    def stage(self) -> str:
        return str(self.recipe["stage"]["name"]) if self.recipe else "?"

    @property
    def state(self) -> str:
        if not (self.path / RECIPE_FILE).is_file():
            return "not started"
        if is_finished(self.path):
            return "finished"
        if not self.recipe:
            return f"{RECIPE_FILE} is damaged"
        if self.is_rejected:
            return "rejected"
        done = self.metrics[-1]["step"] + 1 if self.metrics else 0
        where = f"step {done:,} of {self.recipe['train']['steps']:,}"
        if is_running(self.path):
            return f"running, {where}"
        return f"stopped at {where}" if self.error is None else f"failed at {where}"

    @property
    def error(self) -> str | None:
        """What made the newest start fail, if it did and the run has not gone on since."""
        if is_finished(self.path) or is_running(self.path):
            return None
        try:
            return (self.path / FAILED_FILE).read_text(errors="replace")
        except OSError:
            return None

    @property
    def last(self) -> str:
        """The last loss and cosines, in words."""
        last = self.metrics[-1] if self.metrics else {}
        shown = {name: last.get(name) for name in SHOWN}
        return "  ".join(
            f"{name} {value:.4f}" for name, value in shown.items() if isinstance(value, int | float)
        )

    @property
    def parent(self) -> str | None:
        """What the run started from: a run's folder, a checkpoint, a hub id."""
        parent: str | None = self.card.get("parent")
        return parent

    def lineage(self) -> Iterator["RunInfo"]:
        """This run, the run it started from, and so on, as far as they are here."""
        run, seen = self, set()
        while run.path not in seen and (run.path / RECIPE_FILE).is_file():
            seen.add(run.path)
            yield run
            parent = Path(run.parent or "").resolve()
            run = RunInfo(parent.parent if parent.name == FINAL else parent)


def find_runs(folder: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """Every run below a folder (or the folder itself), by name; runs hold no runs.

    above: folders that it is in; a link back to one of them is not followed.
    """
    if (folder / RECIPE_FILE).is_file():
        return [folder]
    above |= {folder.resolve()}
    below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [run for inner in below if inner.resolve() not in above for run in find_runs(inner, above)]


def stages_of(folder: Path) -> dict[str, RunInfo]:
    """The runs of a pipeline's folder by label, in its order and also those to come; a run's folder holds one.

    Raises ValueError for a folder that is neither.
    """
    if (folder / RECIPE_FILE).is_file():
        return {folder.name: RunInfo(folder)}
    if (folder / PIPELINE_FILE).is_file():
        try:
            labels = [str(label) for label in yaml.safe_load((folder / PIPELINE_FILE).read_text())["stages"]]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ValueError(
                f"{folder / PIPELINE_FILE} is damaged: {type(error).__name__}: {error}"
            ) from None
        return {label: RunInfo(folder / label) for label in labels}
    if folder.is_dir() and (found := find_runs(folder)):
        return {str(path.relative_to(folder)): RunInfo(path) for path in found}
    raise ValueError(
        f"{folder} is no run (no {RECIPE_FILE}), no pipeline (no {PIPELINE_FILE}) and holds none"
    )
