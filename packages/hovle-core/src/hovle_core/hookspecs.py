"""Every hook there is. Three kinds, and no others: *what exists*, *who handles this*, *tell me when*.

A plugin is one module, named by an entry point of the group ``hovle``; it says ``HOVLE_HOOK_API = 1`` (the
number below, written out) and implements any of these functions, marked ``@hookimpl``. A hook is never called
per token, layer or micro-batch. Plugin modules are imported to list them, so they must not import torch:
point to what is heavy with a :class:`~hovle_core.registry.Spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import argparse

    from hovle_core.registry import Spec

#: Raised only when an existing plugin would have to change; the loader refuses plugins with another number.
HOVLE_HOOK_API = 1

hookspec = pluggy.HookspecMarker("hovle")
hookimpl = pluggy.HookimplMarker("hovle")

# --- what exists -----------------------------------------------------------------------------------------------


@hookspec
def hovle_teachers() -> list[Spec]:  # type: ignore[empty-body]
    """Frozen vision teachers. Target: a callable that returns a ``hovle_core.roles.TeacherEncoder``."""


@hookspec
def hovle_backbones() -> list[Spec]:  # type: ignore[empty-body]
    """Causal LMs with their tokenizers. Target: a callable that returns a ``hovle_core.roles.LLMBackbone``."""


@hookspec
def hovle_tokenizers() -> list[Spec]:  # type: ignore[empty-body]
    """Tokenizers that are not a backbone's own. Target: a callable that returns a ``roles.TokenizerProvider``."""


@hookspec
def hovle_datasets() -> list[Spec]:  # type: ignore[empty-body]
    """Sources of samples. Target: a callable that returns something with ``len()`` and ``[i] -> Sample``."""


@hookspec
def hovle_stages() -> list[Spec]:  # type: ignore[empty-body]
    """Training stages. Target: a stage class (``hovle_train.stages``)."""


@hookspec
def hovle_token_mixers() -> list[Spec]:  # type: ignore[empty-body]
    """What mixes tokens in the embedding's blocks in place of self attention. Target: a callable that is called with
    ``config, layer_idx`` and returns a ``hovle_core.roles.TokenMixer``. ``embedding_config.token_mixer`` names it.
    """


@hookspec
def hovle_recipes() -> list[Spec]:  # type: ignore[empty-body]
    """Recipes that ship with a package. Target: ``"package:relative/file.yaml"``, a file and not an attribute."""


@hookspec
def hovle_commands(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add sub-commands of ``hovle``.

    ``parser = cli.add_parser("train", help=...)``, then ``parser.set_defaults(run=function)`` where
    ``function(args: argparse.Namespace) -> int`` returns the exit code and imports what is heavy inside.
    ``args.plugins`` is the process's :class:`~hovle_core.plugins.HovlePlugins`. A command runs only when every
    plugin loaded; ``parser.set_defaults(tolerates_broken_plugins=True)`` is for commands that use no plugin.
    A ``ValueError`` or ``FileNotFoundError`` from ``function`` is shown to the user as one line, exit code 2.
    """


# --- who handles this ----------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def hovle_build_model(build: Callable[[], Any], wrappers: Mapping[str, Any]) -> Any:
    """The module that a run trains. Core's own implementation calls ``build()``; plugins wrap it and patch nothing.

    A wrapper is a generator, marked ``@hookimpl(wrapper=True)``: ``model = yield``, then what it does to the model,
    then ``return model``. ``wrappers`` is ``model.wrappers`` of the recipe: settings by the plugin's name. Without its
    own name in there a wrapper returns the model as it came. What trains is decided before: ``requires_grad`` says it.
    """


@hookspec
def hovle_export_model(model: Any, wrappers: Mapping[str, Any], folder: Path) -> None:
    """Training is over and the model is about to be saved in ``folder``: fold into its own weights what was put around
    them. What is to be kept of it by itself goes into a sub-folder.
    """


# --- tell me when (rank 0, after reduction) ----------------------------------------------------------------------


@hookspec
def hovle_on_log(run: Any, step: int, metrics: Mapping[str, float]) -> None:
    """Metrics were logged after optimizer step ``step``; ``run`` describes the run (see ``hovle_train``).

    An observer that raises is named in the log and counted in the run's summary, and the run goes on.
    """


@hookspec
def hovle_on_checkpoint(run: Any, step: int, path: Path) -> None:
    """The checkpoint of optimizer step ``step`` is complete at ``path``."""
