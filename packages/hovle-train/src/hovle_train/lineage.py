"""Whether a folder holds what a recipe asks for: recipes with absolute paths, and where two of them differ."""

import os
from pathlib import Path
from typing import Any

from hovle_train.config import Recipe

# What may change between starts of one run without changing what it computes.
FREE_SECTIONS = ("resources", "observers", "run_dir")
FREE_FIELDS = ("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "data.prefetch_steps")


def differences(saved: dict[str, Any], recipe: Recipe) -> list[str]:
    """Fields in which a saved recipe and this one differ so that results would: `train.steps: 400, now 450`."""
    before = _flat(absolute(Recipe.model_validate(saved)).model_dump(mode="json"))
    now = _flat(absolute(recipe).model_dump(mode="json"))
    return [
        f"{field}: {before.get(field)!r}, now {now.get(field)!r}"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
        and field not in FREE_FIELDS
        and field.split(".", 1)[0] not in FREE_SECTIONS
    ]


def check_same(saved: dict[str, Any], recipe: Recipe, what: str) -> None:
    """Raise ValueError naming the fields in which `what` was made by another recipe."""
    if found := differences(saved, recipe):
        raise ValueError(
            f"{what} was made by another recipe ({'; '.join(found[:5])}): restore it, choose another run_dir, or "
            "delete the folder to start afresh"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = dict(zip(map(str, range(len(value))), value, strict=True)).items()
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with every path that exists here made absolute: workers have another working directory."""
    recipe = recipe.model_copy(deep=True)
    recipe.run_dir = str(recipe.path.resolve())
    for source in [*recipe.data.sources, *recipe.data.images, *recipe.data.texts]:
        source.path = _absolute_path(source.path)
        source.options = _absolute(source.options)
    model = recipe.model
    if model.init_from is not None:
        model.init_from = _absolute_path(model.init_from)
    for named in (model.backbone, model.tokenizer, recipe.stage):
        if named is not None:
            named.options = _absolute(named.options)
    return recipe


def _absolute_path(path: str) -> str:
    return str(Path(path).resolve()) if "://" not in path and Path(path).exists() else path


def _absolute(value: Any) -> Any:
    """Strings that name a file or folder here, anywhere in options, made absolute.

    In free options a name without a separator is left alone: it may be anything. `a/b` is a path.
    """
    if isinstance(value, dict):
        return {key: _absolute(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_absolute(inner) for inner in value]
    if isinstance(value, str) and os.sep in value and "://" not in value and Path(value).exists():
        return str(Path(value).resolve())
    return value
