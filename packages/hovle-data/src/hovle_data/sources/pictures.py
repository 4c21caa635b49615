"""A folder of pictures, each alone or with its text in a file beside it."""

from __future__ import annotations

import json
import logging
from pathlib import Path, PurePosixPath
from typing import Any

from hovle_data.records import IMAGE_SUFFIXES, UNREAD_SUFFIXES, suffix_of
from hovle_data.schema import BadSample, Sample
from hovle_data.sources.chats import read_image
from hovle_data.sources.rows import parse_row
from hovle_data.storage import open_folder, printable

logger = logging.getLogger(__name__)

MAX_LOGGED = 5


class ImageFolderSource:
    """Pictures below a folder or URL, sorted by name; cat.jpg takes its text from cat.txt or cat.json.

    A .txt is the caption; a .json holds `text` or `caption`, or `conversations` or `messages` about the picture. What a
    person would miss is logged and listed in `problems`: pictures of formats that are not read, and, where pictures
    have texts, a text whose picture is missing.

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
        self.pictures = [f for f in files if suffix_of(f) in IMAGE_SUFFIXES]
        if not self.pictures:
            raise ValueError(f"path={path} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
        # by their names as cameras and other systems may have written them: cat.JPG, cat.TXT
        texts = {
            f"{_stem(f)}.{suffix_of(f)}": f for f in files if sidecars and suffix_of(f) in ("txt", "json")
        }
        self.texts = [_beside(picture, texts) for picture in self.pictures]
        self.problems = [
            f"{self.folder}/{f}: format is not read" for f in files if suffix_of(f) in UNREAD_SUFFIXES
        ]
        if any(self.texts):
            stems = {_stem(picture) for picture in self.pictures}
            self.problems += [
                f"{self.folder}/{text}: text without a picture"
                for text in sorted(texts.values())
                if _stem(text) not in stems
            ]
        for problem in self.problems[:MAX_LOGGED]:
            logger.warning("%s", problem)
        if len(self.problems) > MAX_LOGGED:
            logger.warning("%s: %d more such files", self.folder, len(self.problems) - MAX_LOGGED)

    def __len__(self) -> int:
        return len(self.pictures)

    def where(self, i: int) -> str:
        return f"{self.folder}/{self.pictures[i]}"

    def __getitem__(self, i: int) -> Sample:
        key, where = f"{range(len(self))[i]:08d}", self.where(i)
        images = (read_image(self.folder, self.pictures[i], key, where),)
        meta = {"id": printable(str(PurePosixPath(self.pictures[i])))}
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
        if suffix_of(beside) == "txt":
            return Sample(key, images, text.strip(), meta=meta)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(key, where, f"bad json: {error}") from error
        if isinstance(content, dict):  # the picture is this one, whatever the file calls it
            content = {**content, "image": self.pictures[i]}
        row = parse_row(content, key, where)
        return Sample(key, images, row.text, row.messages, meta)


def _beside(picture: str, texts: dict[str, str]) -> str | None:
    stem = _stem(picture)
    return texts.get(f"{stem}.txt") or texts.get(f"{stem}.json")


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
