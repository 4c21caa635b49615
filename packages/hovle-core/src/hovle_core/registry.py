"""What exists, by kind and name: specs are data, the registry finds and builds what they point to."""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import importlib.util
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("teacher", "backbone", "tokenizer", "dataset", "stage", "token_mixer", "recipe")

_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:\S+")


def hook_of(kind: str) -> str:
    """The hook that lists the specs of ``kind``: ``"teacher"`` -> ``"hovle_teachers"``."""
    return f"hovle_{kind}s"


def spelt(kind: str) -> str:
    """A kind as people write it: ``"token_mixer"`` -> ``"token-mixer"``."""
    return kind.replace("_", "-")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Provider(NamedTuple):
    """The distribution that provides something."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class Spec:
    """One thing that a plugin provides, as data: making one imports nothing.

    ``target`` is ``"module:attribute"``; a recipe's is ``"package:relative/file.yaml"``. ``kwargs`` are the
    defaults for the call of the target. ``distribution`` is filled in by the registry.
    """

    name: str
    target: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    summary: str = ""
    distribution: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name != self.name.strip():
            raise ValueError(f"Spec name {self.name!r} must be a non-empty string without surrounding spaces")
        if not isinstance(self.target, str) or not _TARGET.fullmatch(self.target):
            raise ValueError(
                f"Spec {self.name!r}: target {self.target!r} must look like 'package.module:attribute'"
            )
        if not isinstance(self.kwargs, Mapping) or not all(isinstance(key, str) for key in self.kwargs):
            raise ValueError(f"Spec {self.name!r}: kwargs {self.kwargs!r} must be a mapping with string keys")
        if not isinstance(self.summary, str):
            raise ValueError(f"Spec {self.name!r}: summary {self.summary!r} must be one line of text")
        object.__setattr__(self, "kwargs", dict(self.kwargs))

    def __str__(self) -> str:
        return f"{self.name!r} of {self.distribution}" if self.distribution else repr(self.name)

    def load(self) -> Any:
        """Import the target's module and return its attribute.

        Raises ``ValueError`` that names the spec, its distribution and the import error.
        """
        module_name, attribute = self.target.split(":", 1)
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise ValueError(
                f"{self}: cannot import {module_name!r}: {type(error).__name__}: {error}"
            ) from error
        try:
            return attrgetter(attribute)(module)
        except AttributeError as error:
            hint = did_you_mean(attribute, dir(module))
            raise ValueError(f"{self}: {module_name!r} has no attribute {attribute!r}{hint}") from error


class Registry:
    """Specs by kind and name, each with the distribution that provides it.

    ``load_plugins().registry`` is filled from the hooks; an empty one can be filled by hand with :meth:`add`.
    """

    def __init__(self) -> None:
        self._specs: dict[tuple[str, str], tuple[Spec, Provider]] = {}

    def add(self, kind: str, spec: Spec, provider: Provider) -> None:
        """Register ``spec``. A name that is taken is a ``ValueError`` that names both distributions."""
        self.add_all([(kind, spec)], provider)

    def add_all(self, entries: Iterable[tuple[str, Spec]], provider: Provider) -> None:
        """Register every ``(kind, spec)`` of one provider, or, on a ``ValueError``, none of them."""
        specs = dict(self._specs)
        for kind, spec in entries:
            _check_kind(kind)
            if (kind, spec.name) in specs:
                first = specs[kind, spec.name][1]
                who = f"both {first} and {provider}" if first != provider else f"{first} twice"
                raise ValueError(f"the {kind} {spec.name!r} is provided by {who}; rename one of the two")
            specs[kind, spec.name] = (replace(spec, distribution=str(provider)), provider)
        self._specs = specs

    def specs(self, kind: str) -> list[Spec]:
        """All specs of ``kind``, sorted by name."""
        _check_kind(kind)
        return [self._specs[of, name][0] for of, name in sorted(self._specs) if of == kind]

    def get(self, kind: str, name: str) -> Spec:
        """The spec; an unknown name is a ``ValueError`` with a suggestion and the list of known ones."""
        return self._find(kind, name)[0]

    def provider(self, kind: str, name: str) -> Provider:
        """``(distribution, version)`` that provides ``name``."""
        return self._find(kind, name)[1]

    def build(self, kind: str, name: str, /, **kwargs: Any) -> Any:
        """Call the spec's target with its own kwargs, overridden by ``kwargs``.

        Arguments that the target does not take are a ``ValueError`` that lists those it takes.
        """
        spec = self.get(kind, name)
        target = spec.load()
        merged = {**spec.kwargs, **kwargs}
        _check_arguments(f"{kind} {spec}", target, merged)
        return target(**merged)

    def resource(self, kind: str, name: str) -> Path:
        """The file of a spec whose target is ``"package:relative/file"`` (a recipe)."""
        spec = self.get(kind, name)
        package, relative = spec.target.split(":", 1)
        try:
            found = importlib.util.find_spec(package)
        except ImportError as error:
            raise ValueError(f"{kind} {spec}: cannot import {package!r}: {error}") from error
        if found is None:
            raise ValueError(f"{kind} {spec}: there is no package {package!r}")
        if found.submodule_search_locations is None:  # a plain module: its files lie beside it
            package = package.rpartition(".")[0]
        root = importlib.resources.files(package) if package else Path(found.origin or "").parent
        path = root.joinpath(relative)
        if not isinstance(path, Path) or not path.is_file():
            raise ValueError(
                f"{kind} {spec}: there is no file {relative!r} in {root}; is it part of the installed package?"
            )
        return path

    def _find(self, kind: str, name: str) -> tuple[Spec, Provider]:
        _check_kind(kind)
        if (kind, name) not in self._specs:
            known = [spec.name for spec in self.specs(kind)]
            listed = ", ".join(known) or "none is installed"
            raise ValueError(f"there is no {kind} {name!r}{did_you_mean(name, known)} (known: {listed})")
        return self._specs[kind, name]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}{did_you_mean(kind, KINDS)} (kinds: {', '.join(KINDS)})")


def _check_arguments(what: str, target: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse wrong arguments here, where the user's recipe can be named, and not inside the plugin's code."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # builtins without a signature: the call itself has to tell
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        names = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        unknown = next((key for key in kwargs if key not in names), None)
        hint = did_you_mean(unknown, names) if unknown else ""
        raise ValueError(f"{what}: {error}{hint} (it takes: {', '.join(names) or 'nothing'})") from error
