"""Optimizers and learning-rate schedules. A schedule is a function of the step: a resumed run needs no state of it."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from hovle_train.muon import BatchedMuon
from hovle_train.recipe_sections import OptimConfig


def lr_share(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of 0-based `step` as a share of its peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    restarts = [round(share * steps) for share in config.restarts]
    start = max(at for at in (config.warmup_steps, *restarts) if at <= step)
    end = min((at for at in restarts if at > step), default=steps)
    progress = (step - start) / max(1, end - start)
    if config.schedule == "cosine":
        return config.min_lr_share + (1 - config.min_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "wsd":
        return min(1.0, (steps - step) / max(1, round(config.decay_share * steps)))
    return 1.0


def build_optimizers(
    config: OptimConfig, parameters: Mapping[str, nn.Parameter]
) -> list[torch.optim.Optimizer]:
    """Optimizers over trainable parameters by name. Matrices decay, vectors do not.

    Raises ValueError as `check_factors` does.
    """
    check_factors(config, parameters)
    named = list(parameters.items())
    muon = [(name, p) for name, p in named if config.name == "muon" and is_block_matrix(name, p)]
    muon_names = {name for name, _ in muon}
    rest = [(name, p) for name, p in named if name not in muon_names]
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        groups = _groups(config, muon)
        optimizers.append(BatchedMuon(groups, lr=config.lr))
    if rest:
        groups = _groups(config, rest)
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True))
    return optimizers


def check_factors(config: OptimConfig, trainable: Iterable[str]) -> None:
    """Raise ValueError for an `lr_factors` pattern that matches none of these parameters' names."""
    names = list(trainable)
    for pattern in config.lr_factors:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"optim.lr_factors: no trainable parameter matches {pattern!r}")


def set_lr(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon, where it is chosen, updates this parameter."""
    return parameter.ndim == 2 and (".layers." in name or "pixel_shuffle_proj" in name)


def _groups(config: OptimConfig, named: list[tuple[str, nn.Parameter]]) -> list[dict]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        patterns = [pattern for pattern in config.lr_factors if fnmatchcase(name, pattern)]
        factor = config.lr_factors[max(patterns, key=len)] if patterns else 1.0
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": params, "lr": config.lr * factor, "peak_lr": config.lr * factor, "weight_decay": decay}
        for (factor, decay), params in groups.items()
    ]
