"""A wrapper of `hovle_build_model`: runs whose recipe has `model.wrappers.lora` train adapters. Imports no torch."""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from hovle_core.hookspecs import hookimpl

HOVLE_HOOK_API = 1
NAME = "lora"


@hookimpl(wrapper=True)
def hovle_build_model(wrappers: Mapping[str, Any]) -> Generator[None, Any, Any]:
    model = yield
    if NAME in wrappers:
        from hovle_core.wrapping import wrapper_settings
        from hovle_lora.adapters import add_adapters

        add_adapters(model, **wrapper_settings(NAME, add_adapters, wrappers[NAME]))
    return model


@hookimpl
def hovle_export_model(model: Any, wrappers: Mapping[str, Any], folder: Path) -> None:
    if NAME in wrappers:
        from hovle_lora.adapters import FOLDER, merge_adapters, save_adapters

        save_adapters(model, folder / FOLDER)
        merge_adapters(model)
