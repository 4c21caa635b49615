"""What is loaded must be whole: a checkpoint's tensors and those of a peft adapter, from safetensors only."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.utils import is_peft_available

from hovle_core.official import json_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a peft adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(adapter: Path) -> tuple[str, str | None]:
    """The folder or hub id of the model that an adapter is for, and its revision. Raises ValueError for none."""
    config = json_object(adapter / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{adapter}/{ADAPTER_CONFIG} names no base_model_name_or_path: load the base model, then the adapter with "
            "model.load_adapter(folder)"
        )
    return str(base), config.get("revision")


def check_adapter(folder: Path) -> None:
    """Raise FileNotFoundError for one without safetensors, where transformers would go on to a pickle; ValueError for
    a malformed config, ImportError without peft."""
    json_object(folder / ADAPTER_CONFIG)
    if not is_peft_available():
        raise ImportError(f"{folder} holds an adapter, which needs peft: pip install 'hovle-core[peft]'")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}")


def add_adapter(model: "PreTrainedModel", folder: Path, adapter_name: str | None = None) -> dict[str, Any]:
    """Load the adapter in `folder` into `model`; returns transformers' report on it.

    `check_adapter` has passed it. Raises ValueError for one that is damaged or made for another model.
    """
    try:
        info = model.load_adapter(str(folder), adapter_name=adapter_name).to_dict()
    except (RuntimeError, SafetensorError) as error:  # transformers', of another shape; and a damaged file's
        raise ValueError(f"{folder}/{ADAPTER_WEIGHTS} does not fit {ADAPTER_CONFIG}: {error}") from error
    check_whole(str(folder), {**info, "mismatched_keys": ()}, may_mismatch=True)
    return info


def check_whole(name: str, info: Mapping[str, Any], may_mismatch: bool) -> None:
    """Raise ValueError naming a tensor that a checkpoint lacks, has too many, or has in another shape: transformers
    draws it at random, or leaves it out, and only logs it."""
    if not may_mismatch and (misshapen := sorted(info["mismatched_keys"])):
        tensor, found, expected = misshapen[0]
        more = f" (and {len(misshapen) - 1} more like it)" if len(misshapen) > 1 else ""
        raise ValueError(
            f"the tensors of {name} do not fit its config: {tensor} is {list(found)}, expected {list(expected)}{more}"
        )
    for what, key in (
        ("lacks", "missing_keys"),
        ("has, and its config has no place for,", "unexpected_keys"),
    ):
        if found := sorted(info[key]):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ValueError(
                f"{name} {what} the tensor {found[0]}{more}: config and weights do not fit each other"
            )
