"""A wrapper of `hovle_build_model`: runs whose recipe has `model.wrappers.quantization` hold frozen layers in int8.
Imports no torch.

Models are wrapped after everyone else's wrappers and unwrapped before: LoRA puts adapters on linear layers, and merges
them into the weights as they came.
"""

from collections.abc import Generator, Mapping
from typing import Any

from hovle_core.hookspecs import hookimpl

HOVLE_HOOK_API = 1
NAME = "quantization"


@hookimpl(wrapper=True, tryfirst=True)
def hovle_build_model(wrappers: Mapping[str, Any]) -> Generator[None, Any, Any]:
    model = yield
    if NAME in wrappers:
        from hovle_core.wrapping import wrapper_settings
        from hovle_quantization.int8 import quantize

        quantize(model, **wrapper_settings(NAME, quantize, wrappers[NAME]))
    return model


@hookimpl(tryfirst=True)
def hovle_export_model(model: Any, wrappers: Mapping[str, Any]) -> None:
    if NAME in wrappers:
        from hovle_quantization.int8 import restore

        restore(model)
