"""A folder of pictures, each alone or with its text in a file beside it."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from hovle_data.records import IMAGE_SUFFIXES
from hovle_data.schema import BadSample, Sample
from hovle_data.sources.chats import read_image
from hovle_data.sources.rows import parse_row
from hovle_data.storage import open_folder


class ImageFolderSource:
    """Pictures below a folder or URL, sorted by name; cat.jpg takes its text from cat.txt or cat.json.

    A .txt is the caption; a .json holds `text` or `caption`, or `conversations` or `messages` about the picture.

    sidecars: False reads the pictures alone.
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        sidecars: bool = True,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.folder = open_folder(path, storage_options=storage_options)
        self.name = name or self.folder.name
        if not self.folder.exists():
            raise ValueError(f"path={path} is no folder; give a folder of pictures")
        files = self.folder.walk(("",))
        self.pictures = [f for f in files if f.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
        if not self.pictures:
            raise ValueError(f"path={path} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
        texts = {f for f in files if f.endswith((".txt", ".json"))} if sidecars else set()
        self.texts = [_beside(picture, texts) for picture in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def where(self, i: int) -> str:
        return f"{self.folder}/{self.pictures[i]}"

    def __getitem__(self, i: int) -> Sample:
        key, where = f"{range(len(self))[i]:08d}", self.where(i)
        images = (read_image(self.folder, self.pictures[i], key, where),)
        meta = {"id": str(PurePosixPath(self.pictures[i]))}
        beside = self.texts[i]
        if beside is None:
            return Sample(key, images, meta=meta)
        where = f"{self.folder}/{beside}"
        try:
            text = self.folder.read(beside).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample(key, where, f"not UTF-8: {error}") from error
        except OSError as error:
            raise BadSample(key, where, f"unreadable text: {error}") from error
        if beside.endswith(".txt"):
            return Sample(key, images, text.strip(), meta=meta)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(key, where, f"bad json: {error}") from error
        if isinstance(content, dict):  # the picture is this one, whatever the file calls it
            content = {**content, "image": self.pictures[i]}
        row = parse_row(content, key, where)
        return Sample(key, images, row.text, row.messages, meta)


def _beside(picture: str, texts: set[str]) -> str | None:
    stem = picture.rpartition(".")[0]
    return next((name for name in (f"{stem}.txt", f"{stem}.json") if name in texts), None)
