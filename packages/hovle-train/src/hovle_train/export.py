"""The end of a run: its final checkpoint, by one rename, and a summary of what made it."""

import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hovle_train.average import write_averages
from hovle_train.checkpoint import sync_folder
from hovle_train.failure import NonFiniteError
from hovle_train.lineage import weights_hash
from hovle_train.metrics import read_metrics
from hovle_train.runs import (
    CHECKPOINTS,
    FINAL,
    FINAL_EMA,
    METRICS_FILE,
    REJECTED,
    RUN_CARD,
    SUMMARY_FILE,
    write_text,
)
from hovle_train.wrappers import unwrap_model

if TYPE_CHECKING:
    from hovle_train.loop import Trainer


def peak_rss_gib() -> float:
    """The most memory this process ever held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def git_commit() -> str | None:
    """The commit of the folder that the run was started in, if it is a git checkout; `-dirty` where files differ."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changes else commit


def summary(trainer: "Trainer") -> dict[str, Any]:
    """The run card: last metrics, cost, and the lineage that made the checkpoint."""
    recipe = trainer.recipe
    metrics = read_metrics(recipe.path / METRICS_FILE)
    return {
        "stage": recipe.stage.name,
        "steps": recipe.train.steps,
        "metrics": metrics[-1] if metrics else {},
        "peak_rss_gib": round(peak_rss_gib(), 3),
        "precision": str(trainer.dtype).removeprefix("torch."),
        "num_workers": trainer.runtime.world_size,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **trainer.record.to_dict(),
    }


def export_final(trainer: "Trainer") -> None:
    """Write `final/`, an average beside it where asked, and `summary.json`, on rank 0; then drop the checkpoints that
    only resuming needed.

    Raises NonFiniteError for weights that are not finite, which leaves the checkpoints as they are, and LanguageLost
    for a checkpoint that cost the model its language; it is then in `rejected/`, with its average.
    """
    if not trainer.runtime.is_main:
        return
    check_weights(trainer.module.named_parameters())
    folder = trainer.recipe.path
    temporary = folder / f".{FINAL}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        card = _write_all(trainer, temporary)
        try:
            trainer.gate.check(card["language"])
        except ValueError:
            _reject(temporary, folder)
            raise
        write_json(folder / SUMMARY_FILE, card)
        finish(temporary / FINAL, temporary / FINAL_EMA, folder)
    finally:  # also behind a full disk: give back what was taken
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.observers.on_checkpoint(trainer.recipe.train.steps - 1, folder / FINAL)
    if trainer.observers.errors:
        write_json(folder / SUMMARY_FILE, {**card, "observer_errors": trainer.observers.errors})


def finish(weights: Path, average: Path, run_dir: Path) -> None:
    """Move a whole checkpoint, and its average if there is one, to where a finished run has them. `final/` is the last:
    with it the run is finished."""
    if average.is_dir():
        shutil.rmtree(run_dir / FINAL_EMA, ignore_errors=True)
        os.replace(average, run_dir / FINAL_EMA)
    os.replace(weights, run_dir / FINAL)
    shutil.rmtree(run_dir / CHECKPOINTS, ignore_errors=True)


def _reject(temporary: Path, run_dir: Path) -> None:
    """The average goes inside of `rejected/`, where nobody takes it for a finished run's."""
    if (temporary / FINAL_EMA).is_dir():
        os.replace(temporary / FINAL_EMA, temporary / FINAL / FINAL_EMA)
    shutil.rmtree(run_dir / REJECTED, ignore_errors=True)
    os.replace(temporary / FINAL, run_dir / REJECTED)


def check_weights(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise NonFiniteError naming what is not finite of the trained weights: no loss is computed behind the last
    update, which would have told."""
    wrong = [name for name, p in named if p.requires_grad and not torch.isfinite(p).all()]
    if wrong:
        raise NonFiniteError(
            f"{len(wrong)} weights are not finite behind the last step, {wrong[0]} the first: nothing was exported. "
            "Choose another run_dir, or delete this one, and train with a lower optim.lr or with optim.grad_clip"
        )


def _write_all(trainer: "Trainer", folder: Path) -> dict[str, Any]:
    """Write `final/`, and `final_ema/` where asked, into `folder`; returns the card of `final/`."""
    ema = trainer.recipe.optim.ema
    if trainer.averages is not None and ema is not None:
        # Beside: a stage's export may change what it is given, and the weights are still to come.
        averaged = copy.deepcopy(trainer.module) if ema.export == "beside" else trainer.module
        write_averages(trainer.averages, averaged)
        if ema.export == "beside":
            _write(trainer, averaged, folder / FINAL_EMA)
    return _write(trainer, trainer.module, folder / FINAL)


def _write(trainer: "Trainer", module: nn.Module, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    unwrap_model(trainer.plugins, module, trainer.recipe.model.wrappers, folder)
    trainer.stage.export(module, trainer.processor, folder)
    card = summary(trainer) | {
        "weights": weights_hash(str(folder)),
        "language": trainer.gate.measure_after(folder),
    }
    (folder / RUN_CARD).write_text(json.dumps(card, indent=1))
    sync_folder(folder)
    return card


def write_json(path: Path, content: Any) -> None:
    """Atomically replace a JSON file."""
    write_text(path, json.dumps(content, indent=1))
