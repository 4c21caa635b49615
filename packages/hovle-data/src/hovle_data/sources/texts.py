"""Plain text: files of paragraphs, lines, or JSONL rows with a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

from hovle_data.schema import BadSample, Sample
from hovle_data.sources.spans import Chained, Spans, scan_lines, scan_paragraphs
from hovle_data.storage import LocalFile, open_folder

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
Split = Literal["paragraph", "line", "file"]


class TextSource:
    """A text file, a JSONL file with a `text` in each row, or a folder of them (also sub-folders, sorted by name).

    split: what one sample is in a text file: a paragraph (up to the next blank line), a line or the whole file.
    """

    def __init__(
        self,
        path: str | Path,
        split: Split = "paragraph",
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if split not in get_args(Split):
            raise ValueError(f"split={split!r}: give one of {', '.join(get_args(Split))}")
        self.name = name or Path(str(path).rstrip("/")).stem
        folder = open_folder(path, storage_options=storage_options)
        if str(path).endswith(TEXT_SUFFIXES):
            names = [str(path)]
        elif folder.exists():
            names = [f"{folder}/{name}" for name in folder.walk(TEXT_SUFFIXES)]
        else:
            raise FileNotFoundError(2, "No such file or folder", str(path))
        if not names:
            raise ValueError(f"path={path} holds no text ({', '.join(TEXT_SUFFIXES)})")
        self.files = [_scan(LocalFile(name, storage_options), split) for name in names]
        self._chained: Chained = Chained(len(spans) for spans in self.files)

    def __len__(self) -> int:
        return len(self._chained)

    def where(self, i: int) -> str:
        part, j = self._chained.locate(i)
        return self.files[part].where(j)

    def __getitem__(self, i: int) -> Sample:
        part, j = self._chained.locate(i)
        spans, key = self.files[part], f"{i:08d}"
        text = spans.text(j, key)
        if not spans.file.path.endswith(".jsonl"):
            return Sample(key, text=text.strip("\r\n"))
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(key, spans.where(j), f"bad json: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise BadSample(key, spans.where(j), "no text: the row has no string under 'text'")
        return Sample(key, text=row["text"], meta={} if row.get("id") is None else {"id": str(row["id"])})


def _scan(file: LocalFile, split: Split) -> Spans:
    if file.path.endswith(".jsonl") or split == "line":
        return scan_lines(file)
    if split == "paragraph":
        return scan_paragraphs(file)
    spans = Spans(file)
    spans.add(0, file.local.stat().st_size, 1)
    return spans
