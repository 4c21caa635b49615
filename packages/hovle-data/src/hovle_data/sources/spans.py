"""Text files as numbered pieces: where each begins and ends, and its line. A piece is read when it is asked for."""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from hovle_data.schema import BadSample
from hovle_data.storage import LocalFile

_JSON = json.JSONDecoder()
_SPACE = " \t\r\n"


class Chained:
    """Several sequences one behind the other: `locate(i)` says which one, and where in it."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self.ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def locate(self, i: int) -> tuple[int, int]:
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is outside 0..{len(self) - 1}")
        part = bisect_right(self.ends, i)
        return part, i - (self.ends[part - 1] if part else 0)


@dataclass
class Spans:
    """Pieces of one file. problem: why what follows is lost."""

    file: LocalFile
    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    problem: str | None = None

    def __len__(self) -> int:
        return len(self.starts) + (self.problem is not None)

    def add(self, start: int, end: int, line: int) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.lines.append(line)

    def line(self, i: int) -> int:
        return self.lines[i]

    def where(self, i: int) -> str:
        """File and line, and which piece where several share the line."""
        line, near = self.line(i), self.lines[max(0, i - 1) : min(i + 2, len(self.starts))]
        return f"{self.file.path}:{line}" + (f" row {i}" if near.count(line) > 1 else "")

    def state(self, i: int) -> str:
        """A digest of piece i."""
        if i >= len(self.starts):
            return ""
        with self.file.open() as file:
            file.seek(self.starts[i])
            return hashlib.blake2b(file.read(self.ends[i] - self.starts[i]), digest_size=16).hexdigest()

    def text(self, i: int, key: str) -> str:
        """Piece i. Raises `BadSample` where it is not UTF-8, or stands for what cannot be found."""
        if i >= len(self.starts):
            assert self.problem is not None
            raise BadSample(key, self.where(i), self.problem)
        try:
            with self.file.open() as file:
                file.seek(self.starts[i])
                return file.read(self.ends[i] - self.starts[i]).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample(key, self.where(i), f"not UTF-8: {error}") from error
        except (OSError, ValueError) as error:  # ValueError: a URL that cannot be read any more
            raise BadSample(key, self.where(i), f"unreadable file: {error}") from error


def scan_lines(file: LocalFile) -> Spans:
    """Every line that is not blank."""
    spans, start = Spans(file), 0
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                spans.add(start, start + len(line), number)
            start += len(line)
    return spans


def scan_paragraphs(file: LocalFile) -> Spans:
    """Lines up to the next blank one."""
    spans, start, first = Spans(file), 0, 0
    begin = None
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                if begin is not None:
                    spans.add(begin, start, first)
                begin = None
            elif begin is None:
                begin, first = start, number
            start += len(line)
    if begin is not None:
        spans.add(begin, start, first)
    return spans


def scan_json_list(file: LocalFile) -> Spans:
    """The elements of a JSON list, one by one: each is read, and can be broken, by itself."""
    spans = Spans(file)
    with file.open() as opened:
        content = opened.read()
    # latin-1 gives each byte one character, so positions are byte offsets; the text itself is decoded later
    text = content.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    shift = len(content) - len(text)
    position, line, counted = _skip(text, 0), 1, 0
    if text[position : position + 1] != "[":
        raise ValueError(f"{file.path} is no JSON list")
    position = _skip(text, position + 1)
    if text[position : position + 1] == "]":
        return spans
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            _, end = _JSON.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            problem, at = str(getattr(error, "msg", error)), getattr(error, "pos", position)
            break
        spans.add(position + shift, end + shift, line)
        position = _skip(text, end)
        if text[position : position + 1] == "]":
            return spans
        if text[position : position + 1] != ",":
            problem, at = "no comma between elements", position
            break
        position = _skip(text, position + 1)
    spans.problem = f"bad json: {problem}; nothing after it can be read"
    spans.lines.append(line + text.count("\n", counted, at))
    return spans


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position
