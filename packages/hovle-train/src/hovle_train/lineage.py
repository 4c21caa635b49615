"""Whether a folder holds what a recipe asks for: recipes with absolute paths, where two of them differ, and whether
what a run started from is still what it was."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hovle_core import runs
from hovle_core.registry import Registry
from hovle_train.checkpoint import complete_checkpoints, read_state
from hovle_train.config import Recipe
from hovle_train.recipe_sections import Source
from hovle_train.runs import CHECKPOINTS, FINAL, RUN_CARD, SUMMARY_FILE, is_finished, read_summary

# What may change between starts of one run without changing what it computes.
FREE_SECTIONS = ("resources", "observers", "run_dir", "language")
FREE_FIELDS = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.storage_path",
    "train.min_fill",
    "data.max_quarantine_share",
    "data.prefetch_steps",
    "data.num_threads",
    "data.tile_cache_gib",
    "parallel.strategy",
    "parallel.reshard_after_forward",
    "parallel.compile",
    "model.activation_checkpointing",
)
# And what a step of so many samples is cut into; of a step of so many rows it is their length.
FREE_BESIDE_SAMPLES = ("train.micro_batch_tokens", "train.micro_batch_tiles")

DataManifest = dict[str, dict[str, Any]]


def differences(saved: dict[str, Any], recipe: Recipe, moved: Collection[str] = ()) -> list[str]:
    """Fields in which a saved recipe and this one differ so that results would: `train.steps: 400, now 450`.

    moved: fields of paths behind which the same content is.
    """
    before = _flat(absolute(Recipe.model_validate(saved)).model_dump(mode="json"))
    now = _flat(absolute(recipe).model_dump(mode="json"))
    return [
        f"{field}: {before.get(field)!r}, now {now.get(field)!r}"
        for field in sorted(before.keys() | now.keys())
        if not _is_one(before.get(field), now.get(field))
        and field not in FREE_FIELDS
        and field not in moved
        and not (field in FREE_BESIDE_SAMPLES and recipe.train.global_batch_size is not None)
        and field.split(".", 1)[0] not in FREE_SECTIONS
    ]


def _is_one(before: Any, now: Any) -> bool:
    """Equal, or one place: a path that is not here any more was absolute when it was."""
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return bool(before == now)
    return any(map(os.path.isabs, (before, now))) and os.path.realpath(before) == os.path.realpath(now)


def check_made_by(
    card: Mapping[str, Any], recipe: Recipe, parent_weights: str | None, data: DataManifest | None, what: str
) -> None:
    """Raise ValueError if recipe, parent or data are others now than `card` says `what` was made from.

    Where the content is known to be the same, a parent or a source may have moved. data: what the sources hold now;
    None where another check of this start looks at it, {} where none does, and paths count.
    """
    moved = set()
    if parent_weights is not None and card.get("parent_weights") == parent_weights:
        is_backbone = recipe.model.init_from is None  # see `parent_of`
        moved.add("model.backbone.options.path" if is_backbone else "model.init_from")
    for field, before in (card.get("data_manifest") or {}).items():
        now = before if data is None else data.get(field, {})
        if before.get("sha256") is not None and before["sha256"] == now.get("sha256"):
            moved.add(f"{field}.path")
    check_same(card["recipe"], recipe, what, moved)
    check_parent(card.get("parent_weights"), parent_weights, recipe, what)
    check_data(card.get("data_manifest"), data, recipe, what)


def check_same(saved: dict[str, Any], recipe: Recipe, what: str, moved: Collection[str] = ()) -> None:
    """Raise ValueError naming the fields, but for what has `moved`, in which `what` was made by another recipe."""
    try:
        found = differences(saved, recipe, moved)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{what} was made by another version of hovle-train, whose recipe this one does not read ({field}: "
            f"{first['msg']}): choose another run_dir, or delete the folder to start afresh"
        ) from error
    if found:
        raise ValueError(
            f"{what} was made by another recipe ({'; '.join(found[:5])}): restore it, choose another run_dir, or "
            "delete the folder to start afresh"
        )


def check_finished(recipe: Recipe, data: DataManifest | None = None) -> None:
    """Raise ValueError unless the finished run in the recipe's folder is of this recipe, of its parent as it is, and
    of these `data`, and has the weights that it was left with. data: as for `check_made_by`."""
    check_folder(recipe)
    card, what = read_summary(recipe.path), f"finished run {recipe.path}"
    checked_hash(recipe.run_dir)
    check_made_by(card, recipe, checked_hash(parent_of(recipe)), data, what)


def check_run(recipe: Recipe, registry: Registry) -> None:
    """Raise ValueError if the recipe's folder is no place for a run, if it holds one, finished or not, that this recipe
    cannot go on with, or if the weights to start from are damaged."""
    check_folder(recipe)
    found = complete_checkpoints(recipe.path / CHECKPOINTS)
    if not found and not is_finished(recipe.path):
        checked_hash(parent_of(recipe))
        return
    data = data_manifest(recipe, lambda source: open_source(source, registry))
    if is_finished(recipe.path):
        check_finished(recipe, data)
        return
    check_made_by(
        read_state(found[-1]), recipe, checked_hash(parent_of(recipe)), data, f"checkpoint {found[-1]}"
    )


def check_folder(recipe: Recipe) -> None:
    """Raise ValueError for a `run_dir` that no run can be written to, or whose `final/` no run of ours left."""
    folder = recipe.path
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"run_dir {recipe.run_dir}: {there} is a file; choose another run_dir")
    if not os.access(there, os.W_OK | os.X_OK) and not is_finished(folder):
        raise ValueError(f"run_dir {recipe.run_dir}: {there} is not writable; choose another run_dir")
    final = folder / FINAL
    if final.exists() and not (is_finished(folder) and (folder / SUMMARY_FILE).is_file()):
        raise ValueError(
            f"run_dir {recipe.run_dir}: {final} is there, and no finished run left it (one has {FINAL}/config.json and "
            f"{SUMMARY_FILE}): choose another run_dir, or move it away"
        )


def sources_of(recipe: Recipe) -> dict[str, Source]:
    """Every source of a recipe by its field: `data.images.0`."""
    data = recipe.data
    lists = {"sources": data.sources, "images": data.images, "texts": data.texts}
    return {f"data.{name}.{i}": source for name, sources in lists.items() for i, source in enumerate(sources)}


def open_source(source: Source, registry: Registry) -> Any:
    """The data set that a source names. Raises what its plugin raises."""
    return registry.build("dataset", source.name, path=source.path, **source.options)


def check_texts(recipe: Recipe, registry: Registry) -> None:
    """Raise ValueError naming a text of the language gate that cannot be opened: it is needed behind the last step."""
    for name, source in (recipe.language.texts if recipe.language else {}).items():
        try:
            open_source(source, registry)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"language.texts.{name} ({source.path}): {error}") from error


def data_manifest(recipe: Recipe, open: Callable[[Source], Any]) -> DataManifest:
    """Path and content of each source.

    A source that is not here (deleted to save space, not written yet) is left out. Tars without an index are hashed,
    which reads them.
    """
    manifest: DataManifest = {}
    for field, source in sources_of(recipe).items():
        try:
            opened = open(source)
        except (ValueError, FileNotFoundError):
            continue  # whoever reads it says why
        manifest[field] = {"path": source.path, **content_of(opened)}
    return manifest


def content_of(opened: Any) -> dict[str, Any]:
    """What an open source holds: its samples, and where it tells of them, shards and their SHA-256."""
    return opened.manifest() if hasattr(opened, "manifest") else {"samples": len(opened)}


def check_data(recorded: DataManifest | None, now: DataManifest | None, recipe: Recipe, what: str) -> None:
    """Raise ValueError naming a source that holds other samples than when `what` was made from it.

    Nothing is said of what one of the two does not know.
    """
    for field, before in (recorded or {}).items():
        found = (now or {}).get(field, before)
        changed = [key for key in ("samples", "sha256") if found.get(key) != before.get(key)]
        if changed:
            raise ValueError(
                f"{what} was made from other data: {field} ({found['path']}) had {before['samples']:,} samples, now "
                f"{found['samples']:,}, and its content differs. Restore it, or delete {recipe.run_dir} to train again"
            )


def parent_of(recipe: Recipe) -> str | None:
    """What a run starts from: a HoVLE (`model.init_from`), or the LLM of its backbone; a folder or a hub id."""
    if recipe.model.init_from is not None:
        return recipe.model.init_from
    return recipe.model.backbone.options.get("path") if recipe.model.backbone else None


def weights_hash(parent: str | None) -> str | None:
    """SHA-256 over the safetensors of a run or checkpoint folder; None where there are none here (a hub id)."""
    if parent is None:
        return None
    total = hashlib.sha256()
    files = sorted(_checkpoint_of(parent).glob("*.safetensors"))
    for path in files:
        found = path.stat()
        total.update(path.name.encode() + _digest(path, found.st_size, found.st_mtime_ns))
    return total.hexdigest() if files else None


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, changed_ns: int) -> bytes:
    """SHA-256 of a file. Large weights are asked for at every check of a start, and read once as long as they stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def checked_hash(parent: str | None) -> str | None:
    """`weights_hash`, of weights as the run that exported them left them.

    Raises ValueError for others: damaged, or replaced. Nothing is said of what no run of ours wrote, or one of a
    release that kept no hash, nor where the weights were deleted to save space.
    """
    found = weights_hash(parent)
    if parent is None or found is None:
        return found
    folder = _checkpoint_of(parent)
    card = folder / RUN_CARD
    recorded = json.loads(card.read_text()).get("weights") if card.is_file() else None
    if recorded not in (None, found):
        raise ValueError(
            f"the weights in {folder} are not those that its run wrote (their SHA-256 differs): restore them, or "
            f"delete {folder.parent if folder.name == FINAL else folder} and train it again"
        )
    return found


def _checkpoint_of(path: str) -> Path:
    """The finished checkpoint of a run's folder; any other folder is one itself."""
    return Path(path) / FINAL if is_finished(path) else Path(path)


def plugins_of(parent: str | None) -> dict[str, str]:
    """Plugin -> version, as the run that made a checkpoint wrote them into it; empty where no run of ours did."""
    if parent is None:
        return {}
    return runs.plugins_of(_checkpoint_of(parent))


def check_parent(recorded: str | None, now: str | None, recipe: Recipe, what: str) -> None:
    """Raise ValueError if the parent's weights are others than when `what` started from them.

    Nothing is said where one of the two is not known: a hub id, or a parent that was deleted to save space.
    """
    if recorded is not None and now is not None and recorded != now:
        raise ValueError(
            f"{what} started from {parent_of(recipe)}, whose weights have changed since: delete {recipe.run_dir} to "
            "train it again from the new ones, or restore the old ones"
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
    texts = recipe.language.texts.values() if recipe.language else ()
    for source in [*sources_of(recipe).values(), *texts]:
        source.path = _absolute_path(source.path)
        source.options = _absolute(source.options)
    storage = recipe.train.storage_path
    if storage is not None and "://" not in storage:
        recipe.train.storage_path = str(Path(storage).resolve())
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
