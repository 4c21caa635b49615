"""Annotation files of InternVL (a meta JSON with its JSONL files) and LLaVA (one JSON list)."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hovle_data import checks
from hovle_data.schema import BadSample, Sample
from hovle_data.sources.rows import parse_row
from hovle_data.sources.spans import Chained, Spans, scan_json_list, scan_lines
from hovle_data.storage import Folder, LocalFile, is_url, open_folder

STAND_IN = b"\x89PNG\r\n\x1a\n"  # for a picture that cannot be had, while the rest of its row is looked at


class AnnotationSource:
    """One annotation file, a row a sample: `.jsonl` (a row a line) or `.json` (a list of rows).

    A row is {"id", "image": name or list of names, "conversations": [{"from": "human" | "gpt", "value"}]}; `images`,
    `messages` with `role` and `content`, and `text` or `caption` for pairs are read too.

    root: the folder or URL that names of pictures are relative to; the annotation's own folder when not given.
    repeat_time: as in InternVL, a whole number repeats the rows, one below 1 takes that share from the beginning.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        name: str | None = None,
        repeat_time: float = 1,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.name = name or Path(str(path)).stem
        scan = scan_lines if str(path).endswith(".jsonl") else scan_json_list
        self.rows: Spans = scan(LocalFile(path, storage_options))
        folder = str(path).rpartition("/")[0] or "."
        self.root: Folder = open_folder(folder if root is None else root, storage_options=storage_options)
        if not 0 < repeat_time < math.inf or (repeat_time > 1 and repeat_time != int(repeat_time)):
            raise ValueError(f"repeat_time={repeat_time} of {path}: give a whole number, or a share below 1")
        self.num_unique = len(self.rows) if repeat_time >= 1 else int(len(self.rows) * repeat_time)
        if len(self.rows) and not self.num_unique:
            raise ValueError(f"repeat_time={repeat_time} of {path} leaves none of its {len(self.rows)} rows")
        self._length = self.num_unique * max(1, int(repeat_time))

    def __len__(self) -> int:
        return self._length

    def where(self, i: int) -> str:
        return self.rows.where(i % self.num_unique)

    def state(self, i: int) -> str:
        """Changes with the row of sample i."""
        return self.rows.state(i % self.num_unique)

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self._length:
            raise IndexError(f"sample {i} is outside 0..{self._length - 1}")
        i %= self.num_unique
        key, where = f"{i:08d}", self.rows.where(i)
        text = self.rows.text(i, key)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(key, where, f"bad json: {error}") from error
        row = parse_row(content, key, where)
        images, faults = [], []
        for name in row.images or ():
            try:
                images.append(read_image(self.root, name, key, where))
            except BadSample as bad:
                images.append(STAND_IN)
                faults.append(bad.reason)
        meta = {} if row.id is None else {"id": row.id}
        sample = Sample(key, tuple(images), row.text, row.messages, meta)
        if faults:  # whoever mends the row wants to hear all of it at once
            rest = [reason for reason in checks.problems(sample, decode=False) if reason not in faults]
            raise BadSample(key, where, faults[0], (*faults[1:], *rest))
        return sample


class InternVLSource:
    """InternVL's meta JSON: {set: {"root", "annotation", "repeat_time", ...}}, or one of its JSONL files.

    `root` and `annotation` are taken relative to the meta file's folder, or else to the working directory.
    `data_augment`, `max_dynamic_patch` and `length` belong to InternVL's trainer and are not looked at.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.name = name or Path(str(path)).stem
        if str(path).endswith(".jsonl"):
            self.sets = {self.name: AnnotationSource(path, root, self.name, 1, storage_options)}
        else:
            self.sets = dict(_open_sets(path, root, storage_options))
        self._names = list(self.sets)
        self._keys = _distinct(self._names)
        self._parts = list(self.sets.values())
        # every row once, then the repetitions
        self._once = Chained(part.num_unique for part in self._parts)
        self._again = Chained(len(part) - part.num_unique for part in self._parts)
        self.num_unique = len(self._once)

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def _locate(self, i: int) -> tuple[int, int]:
        if i < self.num_unique:
            return self._once.locate(i)
        part, j = self._again.locate(i - self.num_unique)
        return part, j + self._parts[part].num_unique

    def where(self, i: int) -> str:
        part, j = self._locate(i)
        return self._parts[part].where(j)

    def state(self, i: int) -> str:
        """Changes with the row of sample i."""
        part, j = self._locate(i)
        return self._parts[part].state(j)

    def __getitem__(self, i: int) -> Sample:
        part, j = self._locate(i)
        try:
            sample = self._parts[part][j]
        except BadSample as bad:  # rows are numbered within a set
            key = f"{self._keys[part]}-{bad.key}"
            raise BadSample(key, bad.source, bad.reason, bad.further) from bad
        # ids are unique within a set only
        meta = {**sample.meta, "set": self._names[part]} if len(self._names) > 1 else sample.meta
        return replace(sample, key=f"{self._keys[part]}-{sample.key}", meta=meta)


def read_image(root: Folder, name: Any, key: str, where: str) -> bytes:
    """The file of a picture. Raises `BadSample` naming the picture where it cannot be had."""
    if not isinstance(name, str):
        raise BadSample(key, where, f"bad image name: {type(name).__name__} where a string belongs")
    if is_url(name):
        raise BadSample(key, where, f"image is a URL: download {name} first, and give the folder as root")
    try:
        return root.read(name)
    except FileNotFoundError as error:
        raise BadSample(key, where, f"missing image: {name} is not in {root}") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise BadSample(key, where, f"unreadable image: {name}: {error}") from error


def _open_sets(
    path: str | Path, root: str | Path | None, options: dict[str, Any] | None
) -> list[tuple[str, AnnotationSource]]:
    try:
        with LocalFile(path, options).open() as file:
            meta = json.loads(file.read())
    except ValueError as error:
        raise ValueError(f"{path}: not a meta file: {error}") from error
    if not isinstance(meta, dict) or not meta:
        raise ValueError(
            f"{path}: not a meta file: give an object of sets, or read a list of rows as 'llava'"
        )
    found = []
    for name, entry in meta.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
            raise ValueError(f"{path}: set {name!r} has no 'annotation'; give the path of its JSONL")
        repeat_time = entry.get("repeat_time", 1)
        if not isinstance(repeat_time, int | float):
            raise ValueError(f"{path}: set {name!r}: repeat_time={repeat_time!r} is no number")
        annotation = _beside(path, entry["annotation"])
        folder = root if root is not None else _beside(path, entry["root"]) if entry.get("root") else None
        found.append((name, AnnotationSource(annotation, folder, name, repeat_time, options)))
        if not len(found[-1][1]):
            raise ValueError(f"{path}: set {name!r}: {annotation} holds no rows; leave it out")
    return found


def _beside(meta: str | Path, path: str) -> str:
    """A path of a meta file: an absolute one or URL as it is, else beside the meta file, else as it is."""
    if is_url(path) or Path(path).is_absolute():
        return path
    beside = f"{str(meta).rpartition('/')[0] or '.'}/{path}"
    return beside if is_url(meta) or Path(beside).exists() or not Path(path).exists() else path


def _distinct(names: list[str]) -> list[str]:
    """Names of sets as parts of keys: only letters, digits and dashes, and still distinct."""
    cleaned = [re.sub(r"[^\w-]+", "-", name)[:40] for name in names]
    return [name if cleaned.count(name) == 1 else f"{name}{i}" for i, name in enumerate(cleaned)]
