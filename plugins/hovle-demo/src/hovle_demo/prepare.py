"""`prepare`: from the installed data packages to shards, a tokenizer and a manifest, each part once."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hovle_data.schema import Sample
from hovle_data.shards import write_shards
from hovle_data.workers import default_workers, work
from hovle_demo.leaks import check_no_leak
from hovle_demo.packages import ALL
from hovle_demo.sample_sets import HELD_OUT_SETS, TRAIN_SETS, build_sets
from hovle_demo.sources import load_sources
from hovle_demo.tokenizer import sample_texts, save_tokenizer

# Raise this with every change that gives other samples or another tokenizer: prepared folders are then made anew.
CODE_VERSION = 6

SETS = (*TRAIN_SETS, *HELD_OUT_SETS)
# The tokenizer learns from training text only.
TOKENIZER_SETS = ("text", "chat_text", "captions", "captions_flags", "vqa_emoji", "vqa_flags")

MANY = 10_000  # samples that take longer than starting a process to help

Progress = Callable[[str, int, int], None]


def prepare(
    out: Path, seed: int = 0, progress: Progress | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Writes `out`/shards/{set}, `out`/tokenizer and `out`/manifest.json; returns the manifest.

    What is complete and was made by the same code, packages, seed and limit is kept; the rest is written, each part
    whole or not at all, so that a stopped preparation goes on where it was. `limit` keeps so many emoji, and
    pictures of each easy-VQA split (for tests). `progress` is called with (task, done, total).

    Raises ValueError naming package and version where a data package is missing or is not the pinned one, and
    where anything held out is found in a training set.
    """
    for package in ALL:
        package.root()
    fingerprint = _fingerprint(seed, limit)
    manifest_path = out / "manifest.json"
    manifest = _read(manifest_path)
    if manifest.get("fingerprint") != fingerprint:
        manifest = {
            "fingerprint": fingerprint,
            "seed": seed,
            "limit": limit,
            "packages": {
                package.distribution: {
                    "version": package.version,
                    "licence": package.licence,
                    "attribution": package.attribution,
                }
                for package in ALL
            },
            "tokenizer": None,
            "sets": {},
        }
    missing = [name for name in SETS if not _is_complete(out / "shards" / name, manifest["sets"].get(name))]
    tokenizer_missing = not _is_complete(out / "tokenizer", manifest["tokenizer"])
    if not missing and not tokenizer_missing:
        return manifest

    sets = build_sets(load_sources(limit, progress), seed)
    check_no_leak(sets, TRAIN_SETS, HELD_OUT_SETS)
    if tokenizer_missing:
        manifest["tokenizer"] = _write_tokenizer(sets, out / "tokenizer")
        _write(manifest_path, manifest)
    tasks = [(name, sets[name]) for name in missing]
    done, total = 0, sum(len(samples) for _, samples in tasks)
    workers = default_workers() if total >= MANY else 1
    for name, entry in zip(missing, work(_write_set, out / "shards", tasks, workers), strict=True):
        manifest["sets"][name] = entry
        _write(manifest_path, manifest)
        done += entry["samples"]
        if progress:
            progress("write shards", done, total)
    return manifest


def _fingerprint(seed: int, limit: int | None) -> str:
    made_by = [CODE_VERSION, seed, limit, [(package.distribution, package.version) for package in ALL]]
    return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()


def _write_set(shards: Path, task: tuple[str, Sequence[Sample]]) -> dict[str, Any]:
    """One set into its folder of `shards`; its entry of the manifest."""
    name, samples = task
    folder = shards / name
    # The old one, and what a process that was killed left behind.
    for stale in (folder, *folder.parent.glob(f"{folder.name}.tmp-*")):
        shutil.rmtree(stale, ignore_errors=True)
    index = write_shards(samples, folder)
    return {
        "samples": len(samples),
        "kind": samples[0].kind,
        "pictures": len({png for sample in samples for png in sample.images}),
        "words": sum(len(text.split()) for sample in samples for text in sample_texts(sample)),
        "sha256": index.sha256,
        "files": _files(folder),
    }


def _write_tokenizer(sets: Mapping[str, Sequence[Sample]], folder: Path) -> dict[str, Any]:
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        vocab_size = save_tokenizer((sample for name in TOKENIZER_SETS for sample in sets[name]), partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"vocab_size": vocab_size, "trained_on": list(TOKENIZER_SETS), "files": _files(folder)}


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _is_complete(folder: Path, entry: Mapping[str, Any] | None) -> bool:
    """Whether the manifest knows the folder and its files have the sizes they were written with."""
    return entry is not None and folder.is_dir() and _files(folder) == entry["files"]


def _read(path: Path) -> dict[str, Any]:
    """The manifest, or {} where there is none or a half-written one of another program."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, manifest: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
