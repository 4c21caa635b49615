"""Checkpoints of a run in progress: what trains, the optimizer's state, the step and what waits to be packed;
safetensors and JSON only.

Learning rate, data order and randomness are functions of the step, so these four resume a run exactly. A checkpoint
appears by one rename, and carries the size of each of its files: what is torn is detected and the one before it used.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hovle_train.average import KIND, WeightAverage

logger = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save(
    folder: Path,
    step: int,
    weights: Mapping[str, nn.Parameter],
    optimizers: Iterable[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-<step>`, then drop all but the newest `keep`. Returns its path.

    `weights` are the tensors a run changes, by name; what is frozen comes from the parent checkpoint.
    """
    target = folder / f"step-{step:08d}"
    temporary = folder / f".writing-{step:08d}-{os.getpid()}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in weights.items()}, temporary / MODEL)
    save_file(optimizer_state(weights, optimizers), temporary / OPTIMIZER)
    sizes = {name: (temporary / name).stat().st_size for name in (MODEL, OPTIMIZER)}
    content = {"step": step, "sizes": sizes, **state}
    (temporary / STATE).write_text(json.dumps(content, indent=1))
    sync_folder(temporary)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def sync_folder(folder: Path) -> None:
    """Bring a folder's files to the disk, so that a rename cannot outrun them."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first; a torn one is passed over with a warning."""
    found = []
    for path in sorted(folder.glob("step-*")):
        if _is_whole(path):
            found.append(path)
        else:
            logger.warning("checkpoint %s is torn: using the one before it", path)
    return found


def _is_whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / STATE).read_text())["sizes"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        (path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items()
    )


def load(
    path: Path, weights: Mapping[str, nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    """Restore weights and optimizers from a checkpoint folder.

    Raises ValueError naming tensors that do not fit: the recipe then changed since the checkpoint was written.
    """
    saved = load_file(path / MODEL)
    if saved.keys() != weights.keys() or any(saved[name].shape != weights[name].shape for name in weights):
        differing = sorted(saved.keys() ^ weights.keys())[:5]
        differing = differing or [name for name in weights if saved[name].shape != weights[name].shape][:5]
        raise ValueError(
            f"checkpoint {path} does not fit this recipe (first differences: {differing}); "
            "restore the recipe, or choose another run_dir to start afresh"
        )
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(saved[name])
    load_optimizer_state(weights, optimizers, load_file(path / OPTIMIZER))


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: its step, recipe, plugins, cost."""
    return json.loads((path / STATE).read_text())


def optimizer_state(
    weights: Mapping[str, nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """What optimizers and averages remember of each parameter, as `<kind>/<parameter name>` (`exp_avg/head.weight`).

    Their settings are the recipe's and the step's, and are not stored.
    """
    names: dict[torch.Tensor, str] = {p: name for name, p in weights.items()}
    return {
        f"{kind}/{names[p]}": value.detach().cpu().contiguous()
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for kind, value in state.items()
    }


def load_optimizer_state(
    weights: Mapping[str, nn.Parameter],
    optimizers: Iterable[torch.optim.Optimizer],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Restore what `optimizer_state` gave, on the parameters' devices."""
    # Every averaged weight has an optimizer as well.
    owner = {
        (isinstance(optimizer, WeightAverage), p): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        p = weights[name]
        owner[kind == KIND, p].state[p][kind] = value.to(p.device)
