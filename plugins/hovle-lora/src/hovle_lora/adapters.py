"""LoRA adapters put into a model in place, saved in peft's format, and merged into the weights that they sit on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from hovle_core.wrapping import model_within

#: Every projection of the LLM's blocks; of the embedding's, `.*embedding\.layers\..*_proj`.
LLM_PROJECTIONS = r"(.*\.)?language_model\..*(q|k|v|o|qkv|gate|up|gate_up|down)_proj"
#: Beside the merged model: peft reads it with the model that the run started from.
FOLDER = "adapter"


def add_adapters(
    module: nn.Module,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = LLM_PROJECTIONS,
    freeze: Sequence[str] = ("language_model.",),
) -> None:
    """Put adapters on the modules of the model in `module` that match `target_modules` (as peft reads it: a pattern,
    a list of names or their ends, "all-linear"), and freeze what lies under `freeze`.

    Adapters train; everything else keeps the `requires_grad` that it had. Draws from torch's global generator.
    Raises ValueError for an `r` that is no rank, and where nothing matches.
    """
    if r < 1:
        raise ValueError(f"model.wrappers.lora.r must be a rank of at least 1, got {r}")
    model = model_within(module)
    names = [name for name, _ in model.named_parameters()]
    for part in freeze:
        if not any(_under(part, name) for name in names):
            raise ValueError(
                f"model.wrappers.lora.freeze {part!r} matches no parameter; there are {names[:3]}"
            )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # type: ignore[arg-type]  # scaled by alpha / r, whole or not
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:  # peft's own lists no names
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        raise ValueError(
            f"model.wrappers.lora.target_modules {target_modules!r} matches no module; there are {linear[:3]} and "
            f"{max(0, len(linear) - 3)} more"
        ) from error
    for name, parameter in model.named_parameters():
        own = name.replace(".base_layer.", ".")
        is_frozen = any(_under(part, own) for part in freeze)
        parameter.requires_grad_(".lora_" in name or (own in trained and not is_frozen))


def save_adapters(module: nn.Module, folder: Path) -> None:
    """The adapters alone, as `PeftModel.from_pretrained` reads them onto the model that the run started from."""
    model = model_within(module)
    config = model.peft_config["default"]
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    config.save_pretrained(str(folder))
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def merge_adapters(module: nn.Module) -> None:
    """Add each adapter to the weight under it and take it away: the model has its own modules again."""
    model = model_within(module)
    layers: Mapping[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    del model.peft_config


def _under(part: str, name: str) -> bool:
    return f".{part}" in f".{name}"
