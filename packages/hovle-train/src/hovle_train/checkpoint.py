"""Checkpoints of a run in progress: what trains, the optimizer's state, the step and what waits to be packed;
safetensors and JSON only.

Learning rate, data order and randomness are functions of the step, so these four resume a run exactly. A checkpoint
appears by one rename, and carries size and SHA-256 of each of its files: what is torn is detected and the one before it
used.
"""

import hashlib
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
from hovle_train.sharded import share_like, whole

logger = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
DIGEST = "digest"  # of all else in STATE


Tensors = dict[str, dict[str, torch.Tensor]]
"""Whole tensors on the CPU, by file and name."""


def gather(
    weights: Mapping[str, nn.Parameter], optimizers: Iterable[torch.optim.Optimizer], keep: bool = True
) -> Tensors:
    """What a checkpoint holds: the tensors a run changes, and the optimizer's; what is frozen is the parent's.

    All ranks call it, since each may hold a share of a tensor; those with `keep` get the tensors.
    """
    files: Tensors = {MODEL: {}, OPTIMIZER: {}}
    named = {MODEL: weights, OPTIMIZER: optimizer_state(weights, optimizers)}
    for file, tensors in named.items():
        for name, tensor in tensors.items():
            found = whole(tensor.detach())
            if keep:
                files[file][name] = found.cpu().contiguous()
    return files


def save(folder: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-<step>`, then drop all but it and the `keep - 1` whole ones before it. Returns its path.

    What says that it is newer was not good enough to go on from: a run does not step back otherwise.
    """
    target = folder / f"step-{step:08d}"
    temporary = folder / f".writing-{step:08d}-{os.getpid()}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        for name, content_of in tensors.items():
            save_file(content_of, temporary / name)
        sizes = {name: (temporary / name).stat().st_size for name in tensors}
        hashes = {name: file_hash(temporary / name) for name in tensors}
        content = {"step": step, "sizes": sizes, "sha256": hashes, **state}
        content[DIGEST] = _digest(content)
        (temporary / STATE).write_text(json.dumps(content, indent=1))
        sync_folder(temporary)
    except BaseException:  # a full disk: give back what was taken
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    before = [path for path in complete_checkpoints(folder) if path.name < target.name]
    kept = {target, *before[::-1][: keep - 1]}
    for path in folder.glob("step-*"):
        if path not in kept:
            shutil.rmtree(path)
    return target


def sync_folder(folder: Path) -> None:
    """Bring a folder's files to the disk, so that a rename cannot outrun them."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of what a state says, however it is laid out as JSON."""
    content = json.loads(json.dumps({name: value for name, value in state.items() if name != DIGEST}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are byte for byte what was written; others are passed over with a warning."""
    for path in reversed(complete_checkpoints(folder)):
        state = read_state(path)
        hashes = state.get("sha256", {})  # checkpoints of older releases have none, nor a digest
        changed = [name for name, digest in hashes.items() if file_hash(path / name) != digest]
        if state.get(DIGEST) not in (None, _digest(state)):
            changed.append(STATE)
        if changed:
            logger.warning("checkpoint %s is damaged (%s): using the one before it", path, ", ".join(changed))
            continue
        return path
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with files of the right sizes, oldest first; a torn one is passed over with a warning."""
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
            parameter.copy_(share_like(parameter, saved[name]))
    load_optimizer_state(weights, optimizers, load_file(path / OPTIMIZER))


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: its step, recipe, plugins, cost."""
    return json.loads((path / STATE).read_text())


def optimizer_state(
    weights: Mapping[str, nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """What optimizers and averages remember of each parameter, as `<kind>/<parameter name>` (`exp_avg/head.weight`), as
    it is.

    Their settings are the recipe's and the step's, and are not stored.
    """
    names: dict[torch.Tensor, str] = {p: name for name, p in weights.items()}
    return {
        f"{kind}/{names[p]}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for kind, value in state.items()
    }


def load_optimizer_state(
    weights: Mapping[str, nn.Parameter],
    optimizers: Iterable[torch.optim.Optimizer],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Restore what `gather` found of optimizers, on the parameters' devices and in their shards."""
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
        restored = share_like(p, value) if value.shape == p.shape else value.to(p.device)
        owner[kind == KIND, p].state[p][kind] = restored
