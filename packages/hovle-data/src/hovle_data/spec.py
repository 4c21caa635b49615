"""What to build from: a YAML file of sources, or one path whose kind is plain to see."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from hovle_core.registry import Registry
from hovle_data.mixture import Source
from hovle_data.records import IMAGE_SUFFIXES
from hovle_data.sections import Section, explain, read_yaml
from hovle_data.storage import is_url


class SourceSpec(Section):
    """One source, spelled as in a recipe: `name` is a registered dataset kind, `options` are its own."""

    path: str
    name: str
    options: dict[str, Any] = {}


class BuildSpec(Section):
    """What `hovle data build` reads. Relative paths are relative to the file."""

    sources: list[SourceSpec] = Field(min_length=1)
    samples_per_shard: int = Field(1000, ge=1)
    # A checkpoint or folder with a processor: samples that it cannot encode are bad, and the index holds what the
    # others take in tokens and tiles.
    processor: str | None = None
    # A build fails above this share of bad samples.
    max_bad_share: float = Field(0.01, ge=0, le=1)
    # Decode every picture, so that what is built has no broken one.
    check_images: bool = True


def load_spec(
    path: str | Path, kind: str | None = None, options: Mapping[str, Any] | None = None
) -> BuildSpec:
    """A YAML file of sources, or one source at `path`, of `kind` or guessed.

    Raises FileNotFoundError for no such path, ValueError naming every bad key with a suggestion.
    """
    if kind is None and str(path).endswith((".yaml", ".yml")):
        if options:
            raise ValueError(f"options {dict(options)} go into {path}, under the source that they are for")
        return _read_spec(Path(path))
    if not is_url(path) and not Path(path).exists():
        raise FileNotFoundError(2, "No such file or folder", str(path))
    source = SourceSpec(path=str(path), name=kind or guess_kind(path), options=dict(options or {}))
    return BuildSpec(sources=[source])


def open_sources(spec: BuildSpec, registry: Registry) -> list[Source]:
    """Build every source. Raises ValueError naming the one that does not open, or two that share a name."""
    sources: list[Source] = []
    for number, entry in enumerate(spec.sources):
        try:
            source: Source = registry.build("dataset", entry.name, path=entry.path, **entry.options)
        except (ValueError, OSError) as error:
            what = f"No such file: {error.filename}" if isinstance(error, FileNotFoundError) else str(error)
            raise ValueError(f"sources.{number} ({entry.path}): {what}") from error
        if len(source) == 0:
            raise ValueError(f"sources.{number} ({entry.path}) holds no samples: leave it out")
        sources.append(source)
    names = [prefix(source) for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"sources share the name {twice[0]!r}: give one another name, options: {{name: ...}}"
        )
    return sources


def prefix(source: Source) -> str:
    """What names of shards and keys of this source begin with."""
    return re.sub(r"[^\w-]+", "-", str(getattr(source, "name", "source")))[:40] or "source"


def guess_kind(path: str | Path) -> str:
    """The registered dataset kind that a path looks like. Raises ValueError where that is not plain."""
    text = str(path).rstrip("/")
    if text.endswith(".tar"):
        return "webdataset"
    if text.endswith(".parquet"):
        return "parquet"
    if text.endswith((".txt", ".md", ".rst")):
        return "text"
    if not is_url(path):
        kind = _kind_of_folder(Path(path)) if Path(path).is_dir() else _kind_of_json(Path(path))
        if kind is not None:
            return kind
    elif text.endswith(".jsonl"):
        return "internvl"
    raise ValueError(
        f"{path}: cannot guess what it holds; say so with --kind (hovle plugins list shows the kinds)"
    )


def _kind_of_folder(path: Path) -> str | None:
    suffixes = {file.suffix.lower() for file in path.iterdir()}
    if ".tar" in suffixes:
        return "webdataset"
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return "datasets"
    if ".parquet" in suffixes:
        return "parquet"
    below = {file.suffix.lower() for file in path.rglob("*")}
    if below & {f".{suffix}" for suffix in IMAGE_SUFFIXES}:
        return "images"
    return "text" if below & {".txt", ".md", ".rst", ".jsonl"} else None


def _kind_of_json(path: Path) -> str | None:
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            first = next((line for line in file if not line.isspace()), b"")
        try:
            row = json.loads(first)
        except (ValueError, RecursionError):
            return None
        talks = isinstance(row, dict) and row.keys() & {"conversations", "messages", "image", "images"}
        return "internvl" if talks else "text"
    if path.suffix == ".json":
        with path.open("rb") as file:
            return (
                "llava" if file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" else "internvl"
            )
    return None


def _read_spec(path: Path) -> BuildSpec:
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must be a mapping with `sources`, got {type(raw).__name__}")
    try:
        spec = BuildSpec.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path} is not valid:\n" + explain(error, BuildSpec)) from None
    for source in spec.sources:
        source.path = _beside(path, source.path)
        if isinstance(source.options.get("root"), str):
            source.options["root"] = _beside(path, source.options["root"])
    if spec.processor is not None and (path.parent / spec.processor).exists():
        spec.processor = _beside(path, spec.processor)
    return spec


def _beside(spec: Path, path: str) -> str:
    return path if is_url(path) else str(spec.parent / Path(path).expanduser())
