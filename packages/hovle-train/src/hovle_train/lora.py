"""LoRA through peft: low-rank adapters train, the model under them is frozen; what is exported is merged."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import nn

from hovle_core.modeling import HovleForConditionalGeneration
from hovle_data.sections import Section

if TYPE_CHECKING:
    from peft import PeftModel

# Beside the merged model: peft reads it with the model that the run started from.
ADAPTER_FOLDER = "adapter"


class LoraOptions(Section):
    """As peft's LoraConfig has them. `target_modules`: names of linear layers or their ends, or one pattern over whole
    names; "all-linear" is every linear layer of embedding and LLM but the LLM's head."""

    r: int = Field(16, ge=1)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


def adapt(model: HovleForConditionalGeneration, options: LoraOptions, seed: int) -> "PeftModel":
    """The model with adapters that change nothing yet. Raises ValueError for target_modules that match no layer, and
    where peft is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("stage.options.lora needs peft: pip install 'hovle-train[lora]'") from None
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # peft scales by alpha / r, whole or not
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)  # type: ignore[return-value]
        except ValueError as error:
            raise ValueError(f"stage.options.lora: {error}") from error


def save_adapter(adapted: "PeftModel", folder: Path, base: str | None) -> None:
    """The adapter alone, in peft's format; `base` is what it belongs on top of."""
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(folder / ADAPTER_FOLDER))


def merged(adapted: nn.Module) -> HovleForConditionalGeneration:
    """The model with the adapters added to its weights; the adapted one is used up."""
    model: HovleForConditionalGeneration = adapted.merge_and_unload()  # type: ignore[operator]
    return model
