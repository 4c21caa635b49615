"""What a run's checkpoints say about it: what made them, and what that took."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hovle_core.plugins import HovlePlugins
from hovle_train.config import Recipe
from hovle_train.lineage import (
    DataManifest,
    check_made_by,
    checked_hash,
    data_manifest,
    parent_of,
    plugins_of,
)
from hovle_train.recipe_sections import Source

logger = logging.getLogger(__name__)


class Record:
    """Kept from a run's start on: its lineage, which rank 0 alone looks up, and its cost, earlier starts included."""

    def __init__(self, recipe: Recipe, plugins: HovlePlugins, commit: str | None):
        self.recipe, self.plugins, self.commit = recipe, plugins, commit
        self.parent_weights: str | None = None
        self.data_manifest: DataManifest = {}
        self.tokens = 0
        self._earlier_seconds, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._started

    def look_up(self, open: Callable[[Source], Any]) -> None:
        """Hash what the run starts from and what it learns from, before any of it is read: what changes meanwhile is
        then noticed. Warns of plugins that changed. Raises ValueError for weights that are damaged."""
        parent = parent_of(self.recipe)
        self.parent_weights = checked_hash(parent)
        self.data_manifest = data_manifest(self.recipe, open)
        for change in self.plugins.changed_since(plugins_of(parent)):
            logger.warning("%s: %s", parent, change)

    def resume(self, state: Mapping[str, Any], path: Path) -> None:
        """Go on from what the checkpoint at `path` says. Raises ValueError if recipe, parent or data are others now."""
        what = f"checkpoint {path}"
        check_made_by(state, self.recipe, self.parent_weights, self.data_manifest, what)
        for change in self.plugins.changed_since(state["plugins"]):
            logger.warning("%s: results may differ from those of an uninterrupted run", change)
        self._earlier_seconds, self.tokens = state["seconds"], state["tokens"]

    def to_dict(self) -> dict[str, Any]:
        """Its part of a checkpoint's state and of the card of the finished one."""
        return {
            "seconds": round(self.seconds, 1),
            "tokens": self.tokens,
            "recipe": self.recipe.model_dump(mode="json"),
            "plugins": self.plugins.versions,
            "commit": self.commit,
            "parent": parent_of(self.recipe),
            "parent_weights": self.parent_weights,
            "data_manifest": self.data_manifest,
        }
