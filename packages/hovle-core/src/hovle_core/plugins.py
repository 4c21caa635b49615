"""The plugin loader. pluggy is lenient, this is not: what would silently do nothing is refused here.

There is no global manager: each process (CLI, Ray worker, Serve replica) calls :func:`load_plugins` once and
hands the result on. Only names cross process boundaries.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Literal

import pluggy

from hovle_core import hookspecs
from hovle_core.registry import KINDS, Provider, Registry, Spec, did_you_mean, hook_of

GROUP = "hovle"
CORE = "core"
CORE_DISTRIBUTION = "hovle-core"

#: Hook name -> the arguments it may take.
HOOKS = {
    name: tuple(inspect.signature(spec).parameters)
    for name, spec in vars(hookspecs).items()
    if name.startswith("hovle_") and hasattr(spec, "hovle_spec")
}


class PluginError(ValueError):
    """A plugin that cannot be used; the message names it, its distribution and the remedy."""


@dataclass(frozen=True)
class PluginInfo:
    """One entry point of the group ``hovle`` and what became of it. ``error`` is set where it is broken."""

    name: str
    provider: Provider
    module: str
    status: Literal["loaded", "disabled", "broken"]
    error: str = ""


@dataclass(frozen=True)
class HovlePlugins:
    """What :func:`load_plugins` found: ``manager`` calls hooks, ``registry`` holds what exists.

    ``plugins`` is sorted by name, core first, and includes what ``HOVLE_PLUGINS`` disabled and what is broken;
    ``provided`` maps each loaded plugin to its ``(kind, spec)`` pairs.
    """

    manager: pluggy.PluginManager
    registry: Registry
    plugins: tuple[PluginInfo, ...]
    provided: Mapping[str, tuple[tuple[str, Spec], ...]]

    @property
    def versions(self) -> dict[str, str]:
        """Loaded plugin -> ``"distribution version"``; written into checkpoints."""
        return {info.name: str(info.provider) for info in self.plugins if info.status == "loaded"}

    def changed_since(self, saved: Mapping[str, str]) -> list[str]:
        """How the plugins differ from ``versions`` as a checkpoint keeps them, a sentence each; empty if they do not.

        Plugins that came since change nothing that was trained, and are not named.
        """
        broken = {info.name for info in self.broken}
        return [
            f"plugin {name!r} was {version} when the checkpoint was written and is "
            + (self.versions.get(name) or ("broken" if name in broken else "not loaded"))
            + " now"
            for name, version in sorted(saved.items())
            if self.versions.get(name) != version
        ]

    @property
    def broken(self) -> tuple[PluginInfo, ...]:
        return tuple(info for info in self.plugins if info.status == "broken")

    def call_one(self, plugin: str, hook: str, **kwargs: Any) -> None:
        """Call ``hook`` of one plugin only, so that an error can be laid at its door."""
        others = [module for name, module in self.manager.list_name_plugin() if name != plugin]
        self.manager.subset_hook_caller(hook, others)(**kwargs)

    def without(self, plugin: str, error: str) -> HovlePlugins:
        """The same with one loaded plugin marked as broken; its hooks are not called any more."""
        self.manager.unregister(name=plugin)
        infos = (
            replace(info, status="broken", error=error)
            if info.name == plugin and info.status == "loaded"
            else info
            for info in self.plugins
        )
        return replace(self, plugins=tuple(infos))

    def rescue(self) -> str:
        """The setting that runs everything but the broken plugins: ``"HOVLE_PLUGINS=data,train"``."""
        names = [info.name for info in self.plugins if info.status == "loaded" and info.name != CORE]
        return f"HOVLE_PLUGINS={','.join(names)}"

    def raise_if_broken(self) -> None:
        """Raise :class:`PluginError` that names every broken plugin and the way out."""
        if self.broken:
            errors = "\n  ".join(info.error for info in self.broken)
            raise PluginError(f"{errors}\n  repair or uninstall it, or run without it: {self.rescue()}")


def load_plugins(*, strict: bool = True) -> HovlePlugins:
    """Import the plugins of all installed distributions, check them and collect what they provide.

    ``HOVLE_PLUGINS=a,b`` loads only these; set but empty, none. ``core`` always loads.

    Strict (training, serving): any broken plugin raises :class:`PluginError`. Otherwise (listing, help) it is
    marked as broken and the others load. A wrong ``HOVLE_PLUGINS`` or a missing core raises in both.
    """
    found = sorted(entry_points(group=GROUP), key=lambda point: (point.name != CORE, point.name))
    if not any(map(_is_core, found)):
        raise PluginError(
            "hovle-core's entry point 'core' is missing: install it again (pip install hovle-core)"
        )
    allowed = _allowed_names({point.name for point in found})

    registry = Registry()
    infos: list[PluginInfo] = []
    modules: dict[str, Any] = {}
    trial = pluggy.PluginManager(
        GROUP
    )  # what pluggy refuses is to break one plugin and not the loading of all
    trial.add_hookspecs(hookspecs)
    provided: dict[str, tuple[tuple[str, Spec], ...]] = {}
    for point in found:
        provider = _provider(point)
        info = PluginInfo(point.name, provider, point.value, "loaded")
        if point.name not in allowed and not _is_core(point):
            infos.append(replace(info, status="disabled"))
            continue
        try:
            _check_name(point, found)
            plugin = _import(point)
            _check_hook_api(plugin)
            _check_hooks(plugin)
            _register(trial, plugin, point.name)
            specs = _specs(plugin)
            registry.add_all(specs, provider)
        except (
            Exception
        ) as error:  # ours say what to do; a plugin's own objects may raise anything when looked at
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            message = f"plugin {point.name!r} of {provider}: {what}"
            if _is_core(point):
                raise PluginError(message) from error
            info = replace(info, status="broken", error=message)
        else:
            modules[point.name], provided[point.name] = plugin, tuple(specs)
        infos.append(info)

    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    for name in reversed(modules):  # pluggy calls the last registered first: this makes it core, a, b, ...
        manager.register(modules[name], name)
    manager.check_pending()
    plugins = HovlePlugins(manager, registry, tuple(infos), provided)
    if strict:
        plugins.raise_if_broken()
    return plugins


def _provider(point: EntryPoint) -> Provider:
    if point.dist is None:  # an entry point made by hand
        return Provider("unknown distribution", "?")
    return Provider(point.dist.name or "unnamed distribution", point.dist.version or "?")


def _is_core(point: EntryPoint) -> bool:
    return point.name == CORE and _provider(point).distribution == CORE_DISTRIBUTION


def _allowed_names(installed: set[str]) -> set[str]:
    setting = os.environ.get("HOVLE_PLUGINS")
    if setting is None:
        return installed
    wanted = {name.strip() for name in setting.split(",")} - {""}
    for name in sorted(wanted - installed):
        raise PluginError(
            f"HOVLE_PLUGINS={setting}: no installed distribution has a plugin {name!r}"
            f"{did_you_mean(name, installed)} (installed: {', '.join(sorted(installed))})"
        )
    return wanted


def _check_name(point: EntryPoint, found: list[EntryPoint]) -> None:
    same = [other for other in found if other.name == point.name]
    if len(same) > 1 and not _is_core(point):
        who = " and ".join(sorted(str(_provider(other)) for other in same))
        raise PluginError(f"the plugin name {point.name!r} is taken by {who}; uninstall one of them")


def _import(point: EntryPoint) -> Any:
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also what is no Exception: SystemExit, a panic of Rust, pytest's skip
        raise PluginError(f"cannot import {point.value!r}: {type(error).__name__}: {error}") from error


def _check_hook_api(plugin: Any) -> None:
    ours = hookspecs.HOVLE_HOOK_API
    theirs = getattr(plugin, "HOVLE_HOOK_API", None)
    if theirs is None:
        raise PluginError(
            f"it does not say for which hook API it was written; add HOVLE_HOOK_API = {ours} to it"
        )
    if theirs != ours:
        newer = isinstance(theirs, int) and theirs > ours
        upgrade = "upgrade hovle-core" if newer else "upgrade the plugin"
        raise PluginError(f"it was written for hook API {theirs!r}, this hovle-core has {ours}; {upgrade}")


def _register(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    other = manager.get_name(plugin)
    if other is not None:
        raise PluginError(f"it is the same module as plugin {other!r}; remove one of the two entry points")
    manager.register(plugin, name)


def _hookimpls(plugin: Any) -> Iterator[tuple[str, str, Any, bool]]:
    """``(attribute, hook, function, is marked @hookimpl)`` of all that is a hook or is named like one."""
    for attribute in dir(plugin):
        value = getattr(plugin, attribute)
        if isinstance(value, ModuleType):  # "import hovle_core" leaves an attribute of that name
            continue
        options = getattr(value, f"{GROUP}_impl", None)
        if isinstance(options, dict):
            yield attribute, options.get("specname") or attribute, value, True
        elif attribute.startswith("hovle_"):
            yield attribute, attribute, value, False


def _check_hooks(plugin: Any) -> None:
    for attribute, hook, function, is_marked in _hookimpls(plugin):
        if hook not in HOOKS:
            raise PluginError(
                f"there is no hook {hook!r}{did_you_mean(hook, HOOKS)} (hooks: {', '.join(HOOKS)})"
            )
        if not is_marked:
            raise PluginError(f"{attribute} is not marked with @hookimpl and would never be called; mark it")
        if inspect.iscoroutinefunction(function):
            raise PluginError(f"{attribute} is async and would never be awaited; make it a plain function")
        for name, parameter in inspect.signature(function).parameters.items():
            problem = None
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                problem = "is variadic"
            elif parameter.kind is parameter.KEYWORD_ONLY:
                problem = "is keyword-only"
            elif parameter.default is not parameter.empty:
                problem = "has a default value"
            if problem:
                raise PluginError(
                    f"{attribute}: parameter {name!r} {problem}, so it would never be passed; "
                    f"make it a plain parameter or remove it (this hook passes: {_listed(HOOKS[hook])})"
                )
            if name not in HOOKS[hook]:
                raise PluginError(
                    f"{attribute}: there is no argument {name!r}{did_you_mean(name, HOOKS[hook])} "
                    f"(this hook passes: {_listed(HOOKS[hook])})"
                )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "nothing"


def _specs(plugin: Any) -> list[tuple[str, Spec]]:
    """All ``(kind, spec)`` that the plugin's "what exists" hooks return."""
    kind_of = {hook_of(kind): kind for kind in KINDS}
    provided: list[tuple[str, Spec]] = []
    for attribute, hook, function, _ in _hookimpls(plugin):
        if hook not in kind_of:
            continue
        try:
            specs = function()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise PluginError(f"{attribute} failed: {type(error).__name__}: {error}") from error
        if not isinstance(specs, list):
            raise PluginError(f"{attribute} must return a list of Spec, it returned {type(specs).__name__}")
        for spec in specs:
            if not isinstance(spec, Spec):
                raise PluginError(f"{attribute} must return a list of Spec, the list holds {spec!r}")
        provided += [(kind_of[hook], spec) for spec in specs]
    return provided
