"""Pipelines: stages that run one after the other, each from the checkpoint of the one before.

    run_dir: runs/mine                     # each stage's run lies in run_dir/<label>
    common: {resources: {num_workers: 8}}  # for every stage; its train.storage_path gets /<label>, too
    stages:                                # label -> a recipe, in the order in which they run
      distillation: {recipe: demo/distillation, optim: {lr: 2.0e-3}}
      alignment: {recipe: alignment.yaml}
      instruction_tuning: {data: ..., optim: ..., train: ...}

A stage takes what `recipe` says (a file beside the pipeline's, or a plugin's name), then `common`, then its own keys.
It is of the kind that its label says, unless `stage.name` says otherwise. Without a `model.init_from` and a
`model.backbone` it starts from the stage before it; in `model.init_from` and in a backbone's `path`, an earlier
stage's label stands for what that stage leaves.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hovle_core.registry import Registry, did_you_mean
from hovle_data.sections import Section, explain
from hovle_train.config import Recipe
from hovle_train.lineage import check_run, parent_of
from hovle_train.recipe_file import apply_overrides, parse_recipe, read_recipe
from hovle_train.runs import is_finished

_LABEL = re.compile(r"[A-Za-z0-9][\w.-]*")


class PipelineFile(Section):
    """What a pipeline's file may hold."""

    run_dir: str
    common: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Pipeline:
    """Recipes by label, in the order in which they run."""

    run_dir: Path
    recipes: Mapping[str, Recipe]

    def to_yaml(self) -> str:
        """The resolved pipeline; read again, it gives the same recipes."""
        stages = {label: recipe.model_dump(mode="json") for label, recipe in self.recipes.items()}
        for stage in stages.values():
            del stage["run_dir"]  # the pipeline's own
        return yaml.safe_dump({"run_dir": str(self.run_dir), "stages": stages}, sort_keys=False)

    def select(self, first: str | None = None, last: str | None = None) -> dict[str, Recipe]:
        """The stages from `first` to `last`, both included. Raises ValueError for what is no label, or no stretch."""
        labels = list(self.recipes)
        for flag, label in (("--from", first), ("--until", last)):
            if label is not None and label not in labels:
                raise ValueError(
                    f"{flag} {label}: no such stage{did_you_mean(label, labels)} (stages: {', '.join(labels)})"
                )
        start = 0 if first is None else labels.index(first)
        stop = len(labels) if last is None else labels.index(last) + 1
        if start >= stop:
            raise ValueError(f"--from {first} comes after --until {last}: no stage is left")
        return {label: self.recipes[label] for label in labels[start:stop]}

    def check(self, selected: Mapping[str, Recipe], registry: Registry) -> None:
        """Raise ValueError, before anything runs, for what could not go on: a stage that was made by another recipe,
        from other data or from a parent that is another now; a parent that is neither there nor about to be trained."""
        folders = {str(recipe.path): label for label, recipe in self.recipes.items()}
        for label, recipe in selected.items():
            registry.get("stage", recipe.stage.name)
            parent = folders.get(parent_of(recipe) or "")
            missing = parent is not None and not is_finished(self.recipes[parent].path)
            if missing and is_finished(recipe.path) and parent in selected:
                raise ValueError(
                    f"{label} is finished, but {parent}, which it started from, is not: delete {recipe.path} to train "
                    f"both, or keep it with --from {label}"
                )
            if missing and parent not in selected and not is_finished(recipe.path):
                raise ValueError(
                    f"{label} starts from {parent}, which has not finished: begin with --from {parent}"
                )
            check_run(recipe, registry)


def is_pipeline(raw: Mapping[str, Any]) -> bool:
    return "stages" in raw


def load_pipeline(name: str | Path, overrides: list[str], registry: Registry) -> Pipeline:
    """Read a pipeline and apply overrides: `<label>.a.b=value` for a stage, `run_dir=...` and `common.a.b=...`.

    Raises as `load_recipe` does, and ValueError for an override of no stage.
    """
    raw, path = read_recipe(name, registry)
    return parse_pipeline(raw, overrides, registry, path)


def parse_pipeline(raw: dict[str, Any], overrides: list[str], registry: Registry, path: Path) -> Pipeline:
    """As `load_pipeline`, of what was read already; recipes that it names count from the folder of `path`."""
    labels = list(raw["stages"]) if isinstance(raw.get("stages"), dict) else []
    own: dict[str, list[str]] = {label: [] for label in labels}
    of_all: list[str] = []
    for override in overrides:
        # A label may have dots itself.
        label = max((label for label in own if override.startswith(f"{label}.")), key=len, default=None)
        head = override.partition(".")[0]
        if label is not None:
            own[label].append(override.removeprefix(f"{label}."))
        elif re.match(r"run_dir=|common\.", override):
            of_all.append(override)
        else:
            known = [*labels, "common", "run_dir"]
            raise ValueError(
                f"--set {override!r} must start with one of {', '.join(known)}{did_you_mean(head, known)}"
            )
    try:
        file = PipelineFile.model_validate(apply_overrides(raw, of_all))
    except ValidationError as error:
        raise ValueError(f"pipeline {path} is not valid:\n" + explain(error, PipelineFile)) from None
    if not file.stages:
        raise ValueError(f"pipeline {path}: stages is empty: name at least one")
    recipes: dict[str, Recipe] = {}
    for label, given in file.stages.items():
        merged = apply_overrides(_merged(label, given, file, registry, path), own[label])
        _start_from_earlier(merged, recipes, registry)
        recipes[label] = parse_recipe(merged, source=f"stage {label!r} of {path}")
    _check_storage(recipes, path)
    return Pipeline(Path(file.run_dir), recipes)


def _merged(
    label: str, given: dict[str, Any], file: PipelineFile, registry: Registry, path: Path
) -> dict[str, Any]:
    if not _LABEL.fullmatch(label):
        raise ValueError(
            f"pipeline {path}: {label!r} names a stage's folder, and must be letters, digits and ._-"
        )
    for name, sections in ((f"stages.{label}", given), ("common", file.common)):
        if "run_dir" in sections:
            raise ValueError(
                f"pipeline {path}: {name}.run_dir is the pipeline's own run_dir/{label}: leave it out"
            )
    base = read_recipe(given["recipe"], registry, path.parent)[0] if "recipe" in given else {}
    own = {key: value for key, value in given.items() if key != "recipe"}
    merged = _merge(_merge(base, _common_of(label, file)), own)
    merged["run_dir"] = str(Path(file.run_dir) / label)
    return _merge({"stage": {"name": label}}, merged)


def _common_of(label: str, file: PipelineFile) -> dict[str, Any]:
    """What is common, as it is for one stage: copies, like runs, lie in a folder of their own."""
    train = file.common.get("train")
    storage = train.get("storage_path") if isinstance(train, dict) else None
    if not isinstance(storage, str):
        return file.common
    return _merge(file.common, {"train": {"storage_path": f"{storage.removesuffix('/')}/{label}"}})


def _check_storage(recipes: Mapping[str, Recipe], path: Path) -> None:
    """Raise ValueError for two stages whose copies would replace each other."""
    owners: dict[str, str] = {}
    for label, recipe in recipes.items():
        storage = recipe.train.storage_path
        if storage is None:
            continue
        place = storage.rstrip("/") if "://" in storage else str(Path(storage).resolve())
        if (other := owners.setdefault(place, label)) != label:
            raise ValueError(
                f"pipeline {path}: {other} and {label} have one train.storage_path, {storage}, and their copies would "
                "replace each other: give each its own, or say it in common, where each stage's label is added"
            )


def _merge(base: Any, over: Any) -> Any:
    """Mappings merge key by key, anything else is replaced; so are the options of what goes by another name."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if base.get("name") != over.get("name", base.get("name")):
        base = {key: value for key, value in base.items() if key != "options"}
    return base | {key: _merge(base[key], value) if key in base else value for key, value in over.items()}


def _start_from_earlier(raw: dict[str, Any], earlier: Mapping[str, Recipe], registry: Registry) -> None:
    """Fill in where a stage starts: an earlier one by its label, or, where nothing is said, the one before it."""
    model = raw.setdefault("model", {})
    if not earlier or not isinstance(model, dict):
        return
    backbone = model.get("backbone")
    if model.get("init_from") is None and backbone is None:
        before = list(earlier.values())[-1]
        if registry.get("stage", before.stage.name).load().leaves_llm:
            model["backbone"] = {"name": "transformers", "options": {"path": before.run_dir}}
        else:
            model["init_from"] = before.run_dir
        return
    options = backbone.get("options") if isinstance(backbone, dict) else None
    for section, key in ((model, "init_from"), (options, "path")):
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key] in earlier:
            section[key] = earlier[section[key]].run_dir
