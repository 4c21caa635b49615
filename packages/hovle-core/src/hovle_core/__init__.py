"""HoVLE: model, processor, plugin loader and the ``hovle`` command.

Names are exported lazily (PEP 562): ``import hovle_core`` imports neither torch nor transformers, so that
``hovle --help`` and plugin modules stay fast. transformers' Auto classes know HoVLE all the same (``hovle_core.auto``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hovle_core import auto

if TYPE_CHECKING:
    from hovle_core.config import HolisticEmbeddingConfig, HovleConfig
    from hovle_core.hookspecs import hookimpl
    from hovle_core.image_processor import HovleImageProcessor
    from hovle_core.modeling import HovleForConditionalGeneration
    from hovle_core.plugins import load_plugins
    from hovle_core.processor import HovleProcessor
    from hovle_core.registry import Registry, Spec

    __version__: str

_MODULE_OF = {
    "HolisticEmbeddingConfig": "config",
    "HovleConfig": "config",
    "HovleForConditionalGeneration": "modeling",
    "HovleImageProcessor": "image_processor",
    "HovleProcessor": "processor",
    "Registry": "registry",
    "Spec": "registry",
    "hookimpl": "hookspecs",
    "load_plugins": "plugins",
}

__all__ = [
    "HolisticEmbeddingConfig",
    "HovleConfig",
    "HovleForConditionalGeneration",
    "HovleImageProcessor",
    "HovleProcessor",
    "Registry",
    "Spec",
    "__version__",
    "hookimpl",
    "load_plugins",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("hovle-core")
    elif name in _MODULE_OF:
        value = getattr(import_module(f"hovle_core.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'hovle_core' has no attribute {name!r}")
    globals()[name] = value  # the next access is an ordinary lookup
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


auto.register()
