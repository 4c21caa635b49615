"""What trains and what does not, decided once a stage."""

from collections.abc import Sequence

from torch import nn


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
    """Train mode for modules that hold something trainable, eval for the rest; dropout goes with its parent."""
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else parent_trains
    for child in module.children():
        set_train_mode(child, module.training)
