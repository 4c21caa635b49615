"""What plugins share that wrap the model of a run (hook `hovle_build_model`)."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hovle_core.registry import did_you_mean


def wrapper_settings(name: str, wrap: Callable[..., None], given: Any) -> dict[str, Any]:
    """`model.wrappers.<name>` of a recipe as arguments of `wrap`, whose first parameter, `module`, is the model.

    Raises ValueError for a field that `wrap` does not take.
    """
    known = [parameter for parameter in inspect.signature(wrap).parameters if parameter != "module"]
    fields = dict(given or {})
    for field in fields:
        if field not in known:
            raise ValueError(
                f"model.wrappers.{name} has no {field!r}{did_you_mean(field, known)} (it has {', '.join(known)})"
            )
    return fields


def model_within(module: nn.Module) -> Any:
    """The transformers model in what a stage trains, which may have heads around it; else all of it."""
    return next((part for part in module.modules() if isinstance(part, PreTrainedModel)), module)
