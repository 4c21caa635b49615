"""What plugins put around a run's model (`model.wrappers`), and take off before it is exported: LoRA and its like."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hovle_core.plugins import CORE, HovlePlugins
from hovle_core.registry import did_you_mean


def wrap_model(plugins: HovlePlugins, module: nn.Module, wrappers: Mapping[str, Any]) -> nn.Module:
    """The module as the plugins that `wrappers` names make it; frozen and trainable parameters are decided already.

    Raises ValueError as `check_wrappers` does, and whatever a wrapper has to say of its settings.
    """
    check_wrappers(plugins, wrappers)
    wrapped: nn.Module = plugins.manager.hook.hovle_build_model(build=lambda: module, wrappers=wrappers)
    return wrapped


def check_wrappers(plugins: HovlePlugins, wrappers: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that is no plugin which wraps models."""
    hook = plugins.manager.hook.hovle_build_model
    known = sorted({impl.plugin_name for impl in hook.get_hookimpls()} - {CORE})
    for name in wrappers:
        if name not in known:
            raise ValueError(
                f"model.wrappers.{name}: no installed plugin of that name wraps models{did_you_mean(name, known)} "
                f"(wrappers: {', '.join(known) or 'none'}); install it, or leave the setting out"
            )


def unwrap_model(plugins: HovlePlugins, module: nn.Module, wrappers: Mapping[str, Any], folder: Path) -> None:
    """Have the plugins fold what they put around the module into its own weights, for a plain checkpoint."""
    plugins.manager.hook.hovle_export_model(model=module, wrappers=wrappers, folder=folder)
