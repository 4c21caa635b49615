"""LoRA adapters put into a model in place, and merged into the weights that they sit on."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from hovle_core.registry import did_you_mean

#: Every projection of the LLM's blocks; of the embedding's, `.*embedding\.layers\..*_proj`.
LLM_PROJECTIONS = r"(.*\.)?language_model\..*(q|k|v|o|qkv|gate|up|gate_up|down)_proj"


def settings(given: Any) -> dict[str, Any]:
    """`model.wrappers.lora` as arguments of `add_adapters`. Raises ValueError for a field that it does not have."""
    known = [name for name in inspect.signature(add_adapters).parameters if name != "model"]
    fields = dict(given or {})
    for name in fields:
        if name not in known:
            raise ValueError(
                f"model.wrappers.lora has no {name!r}{did_you_mean(name, known)} (it has {', '.join(known)})"
            )
    return fields


def add_adapters(
    model: nn.Module,
    r: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    target_modules: str = LLM_PROJECTIONS,
    freeze: Sequence[str] = ("language_model.",),
) -> None:
    """Put adapters on the modules whose names match `target_modules`, and freeze what lies under `freeze`.

    Adapters train; everything else keeps the `requires_grad` that it had. Draws from torch's global generator.
    Raises ValueError for an `r` that is no rank, and where no module matches.
    """
    if r < 1:
        raise ValueError(f"model.wrappers.lora.r must be a rank of at least 1, got {r}")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    config = LoraConfig(
        r=r, lora_alpha=2 * r if alpha is None else alpha, lora_dropout=dropout, target_modules=target_modules
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:  # peft's own lists no names
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"model.wrappers.lora.target_modules {target_modules!r} matches no module; there are {linear[:3]} and "
            f"{max(0, len(linear) - 3)} more"
        ) from error
    for name, parameter in model.named_parameters():
        is_frozen = any(f".{part}" in f".{name}" for part in freeze)
        own = name.replace(".base_layer.", ".")
        parameter.requires_grad_(".lora_" in name or (own in trained and not is_frozen))


def merge_adapters(model: nn.Module) -> None:
    """Add each adapter to the weight under it and take it away: the model has its own modules again."""
    layers: Mapping[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
