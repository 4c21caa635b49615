"""Observers of runs: plugins that are told of metrics and checkpoints. None of them can end a run."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hovle_core.plugins import HovlePlugins
from hovle_core.registry import did_you_mean
from hovle_train.runs import Run

logger = logging.getLogger(__name__)

HOOKS = ("hovle_on_log", "hovle_on_checkpoint")


class Observers:
    """Calls the observer hooks of each plugin by itself. One that raises is named once, counted, and called again.

    `errors`: plugin -> how often it raised and what it said first, for the run's summary. Raises ValueError for
    settings in the recipe's `observers` of a plugin that observes nothing, and for those that the plugin's module
    refuses, if it has a function `check_observer_settings(settings)`.
    """

    def __init__(self, plugins: HovlePlugins, run: Run):
        self.plugins, self.run = plugins, run
        self.errors: dict[str, dict[str, Any]] = {}
        hooks = [getattr(plugins.manager.hook, hook) for hook in HOOKS]
        self.names = sorted({impl.plugin_name for hook in hooks for impl in hook.get_hookimpls()})
        for name, settings in run.recipe["observers"].items():
            if name not in self.names:
                raise ValueError(
                    f"observers.{name}: no installed plugin of that name observes runs"
                    f"{did_you_mean(name, self.names)} (observers: {', '.join(self.names) or 'none'}); "
                    "install it, or leave the setting out"
                )
            # Else a mistake would be told with the first metrics, and what was asked for never written.
            check = getattr(plugins.manager.get_plugin(name), "check_observer_settings", None)
            if check is not None:
                check(settings)

    def on_log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._call("hovle_on_log", step=step, metrics=metrics)

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._call("hovle_on_checkpoint", step=step, path=path)

    def _call(self, hook: str, **kwargs: Any) -> None:
        for name in self.names:
            try:
                self.plugins.call_one(name, hook, run=self.run, **kwargs)
            except (Exception, SystemExit) as error:
                self._count(name, hook, error)

    def _count(self, name: str, hook: str, error: BaseException) -> None:
        if name not in self.errors:
            message = f"{hook}: {type(error).__name__}: {error}"
            logger.warning(
                "observer %r of %s failed, and the run goes on without what it missed: %s",
                name, self.plugins.versions[name], message, exc_info=error,
            )  # fmt: skip
            self.errors[name] = {"count": 0, "first": message}
        self.errors[name]["count"] += 1
