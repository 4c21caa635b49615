"""HoVLE in transformers' Auto classes from `import hovle_core` on, though that import loads neither torch nor
transformers.

Our modules register themselves in their last lines, by transformers' public `AutoConfig.register`,
`AutoModel.register` and so on. Importing them at once would cost every `hovle --help` an import of torch, so each
waits for the registry that it belongs into: Python imports it right after that one (an ordinary entry of
`sys.meta_path`; nothing of transformers is changed). Models are not in the list: transformers imports their registry in
the middle of modules that ours needs. They wait for the first `HovleConfig`, without which no Auto class finds them.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

REGISTERS_IN = {
    "transformers.models.auto.configuration_auto": "hovle_core.config",
    "transformers.models.auto.image_processing_auto": "hovle_core.image_processor",
    "transformers.models.auto.processing_auto": "hovle_core.processor",
}


class RegistryLoader(SourceFileLoader):
    """Loads a registry as Python would by itself, then our module that registers in it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        import_module(REGISTERS_IN[module.__name__])


class RegistryFinder(MetaPathFinder):
    """Leaves every module but the registries to the finders behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in REGISTERS_IN else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = RegistryLoader(fullname, spec.loader.path)
        return spec


def register() -> None:
    """Register in what is imported already, and in the rest when it is (done by `import hovle_core`)."""
    sys.meta_path.insert(0, RegistryFinder())
    for registry, ours in REGISTERS_IN.items():
        if registry in sys.modules:
            import_module(ours)
