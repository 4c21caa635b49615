"""Recipes as people write them: a YAML file or the name a plugin gave it, with `a.b=value` overrides on top."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hovle_core.registry import Registry
from hovle_data.sections import explain, read_yaml
from hovle_train.config import Recipe


def load_recipe(
    recipe: str | Path, overrides: list[str] | None = None, registry: Registry | None = None
) -> Recipe:
    """Read a recipe from a file, or by the name a plugin gave it, and apply `a.b=value` overrides (values are YAML).

    Raises FileNotFoundError for no such file or name, ValueError naming every bad key with a suggestion.
    """
    raw, path = read_recipe(recipe, registry)
    return parse_recipe(apply_overrides(raw, overrides or []), source=str(path))


def read_recipe(
    recipe: str | Path, registry: Registry | None = None, folder: Path = Path()
) -> tuple[dict[str, Any], Path]:
    """The sections of a recipe or pipeline as they stand in its file, and the file: a path, which may count from
    `folder`, or the name that a plugin gave it. Raises as `load_recipe` does for what is not there or no mapping."""
    path = folder / recipe
    if not path.is_file():
        names = [spec.name for spec in registry.specs("recipe")] if registry else []
        if registry is None or str(recipe) not in names:
            raise FileNotFoundError(
                f"no recipe file {str(recipe)!r}, and no plugin offers one by that name (known: {names})"
            )
        path = registry.resource("recipe", str(recipe))
    raw = read_yaml(path.read_text())
    if not isinstance(raw, dict):
        raise ValueError(f"recipe {path} must be a mapping of sections, got {type(raw).__name__}")
    return raw, path


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set `a.b.0.c=value` in a nested mapping; a number indexes a list. Raises ValueError for a malformed override."""
    raw = json.loads(json.dumps(raw, default=str))  # YAML's dates are text here
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} must read key.sub_key=value")
        *parents, last = key.split(".")
        node: Any = raw
        for part in parents:
            node = (
                node[_list_index(node, part, override)]
                if isinstance(node, list)
                else node.setdefault(part, {})
            )
            if not isinstance(node, dict | list):
                raise ValueError(f"override {override!r}: {part!r} is a value, not a section")
        parsed = read_yaml(value)
        node[_list_index(node, last, override) if isinstance(node, list) else last] = parsed
    return raw


def _list_index(node: list, part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"override {override!r}: {part!r} must index a list of {len(node)}")
    return int(part)


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a mapping. Raises ValueError with one line for each problem."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{source} is not valid:\n" + explain(error, Recipe)) from None
