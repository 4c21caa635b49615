"""HoVLE in transformers' Auto classes from `import hovle_core` on, though that import loads neither of the two.

`AutoModel.register` and its kin need the classes themselves, so they would cost every `hovle --help` an import of
torch. Instead each of transformers' registries is followed: once it is imported, before or after hovle_core, the
module of ours that belongs into it is imported too, and that module registers itself in its last lines.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRIES = {
    "transformers.models.auto.configuration_auto": "hovle_core.config",
    "transformers.models.auto.modeling_auto": "hovle_core.modeling",
    "transformers.models.auto.image_processing_auto": "hovle_core.image_processor",
    "transformers.models.auto.processing_auto": "hovle_core.processor",
}


class FollowRegistries(MetaPathFinder):
    """Finds a registry as Python itself would, and has our module imported right after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in REGISTRIES else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_follow(module: ModuleType) -> None:
            execute(module)
            import_module(REGISTRIES[fullname])

        spec.loader.exec_module = execute_and_follow  # type: ignore[method-assign]  # of this one loader object
        return spec


def register() -> None:
    """Register now with what is imported, and with the rest when it is (done by `import hovle_core`)."""
    if not any(isinstance(finder, FollowRegistries) for finder in sys.meta_path):
        sys.meta_path.insert(0, FollowRegistries())
    for registry, ours in REGISTRIES.items():
        if registry in sys.modules:
            import_module(ours)
