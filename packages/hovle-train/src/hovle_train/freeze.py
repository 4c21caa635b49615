"""What trains and what does not, decided once a stage."""

from collections.abc import Sequence

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def freeze_except(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Train the parameters whose names start with one of `prefixes`; freeze the others and put them in eval.

    A module all of whose parameters are frozen stays in eval also through `.train()` of the loop, because the loop
    calls `set_train_mode`. Raises ValueError for a prefix that matches nothing.
    """
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name, _ in module.named_parameters()):
            raise ValueError(f"nothing to train: no parameter starts with {prefix!r}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))
    set_train_mode(module)


def set_train_mode(module: nn.Module, parent_trains: bool = True) -> None:
    """Train mode for modules that hold something trainable, eval for the rest; dropout goes with its parent.

    transformers' layers recompute their activations in train mode only, and gradients run through a frozen LLM as
    well (alignment). So with activation checkpointing a frozen layer is in train mode itself, all its parts in eval.
    """
    parameters = list(module.parameters())
    trains = any(p.requires_grad for p in parameters) if parameters else parent_trains
    recomputes = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    module.training = trains or recomputes
    for child in module.children():
        set_train_mode(child, trains)
