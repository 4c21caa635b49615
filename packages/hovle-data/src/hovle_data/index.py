"""Where every sample lies in its tar: the byte offsets that make a shard randomly accessible.

On disk an index is two files: `index.json` (what the shards are) and `index.safetensors` (where each sample lies in
them, and its counts, see `stored_records`).
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

INDEX_NAME = "index.json"
RECORDS_NAME = "index.safetensors"
INDEX_VERSION = 2
COUNTS = ("tokens", "tiles")  # what a build with a processor counts of each sample
BLOCK = 512  # of a tar; a member's header is the block in front of its data

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd

# webdataset's rule: the key ends at the first dot after the last slash, the rest is the field ("0.png", "json").
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample: its field name and where its bytes are."""

    field: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Record:
    """One sample's place. problem: why it is known to be unreadable (a damaged tar), else None."""

    key: str
    members: tuple[Member, ...]
    problem: str | None = None

    def end(self) -> int:
        return max((member.offset + member.size for member in self.members), default=0)


@dataclass(frozen=True)
class ShardInfo:
    """One tar: file name, size in bytes, sha256 of the file ("" when not computed), records in file order.

    counts: numbers of each record under a name, such as "tokens" and "tiles" if a processor counted them.
    """

    name: str
    size: int
    sha256: str
    records: Sequence[Record]
    counts: Mapping[str, Sequence[int] | NDArray[np.int32]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds; `index.json` in that folder."""

    shards: tuple[ShardInfo, ...]

    @property
    def num_samples(self) -> int:
        return sum(len(shard.records) for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all tars."""
        return sum(shard.size for shard in self.shards)

    @property
    def sha256(self) -> str:
        """One hash over the hashes of all shards, in order."""
        return combined_sha256([shard.sha256 for shard in self.shards])

    def save(self, folder: Path) -> None:
        """Write index.json and index.safetensors into `folder`. The same shards give the same bytes."""
        from hovle_data.stored_records import save_records

        names = [name for name in COUNTS if self.shards and all(name in s.counts for s in self.shards)]
        counts = {
            name: np.concatenate([np.asarray(s.counts[name], np.int32) for s in self.shards])
            for name in names
        }
        records = chain.from_iterable(shard.records for shard in self.shards)
        content = {
            "version": INDEX_VERSION,
            "samples": self.num_samples,
            "sha256": self.sha256,
            **{name: int(counts[name].sum()) for name in names},
            "fields": save_records(folder / RECORDS_NAME, records, counts, self.sha256),
            "shards": [
                {
                    "name": shard.name,
                    "samples": len(shard.records),
                    "bytes": shard.size,
                    "sha256": shard.sha256,
                    **{name: sum(shard.counts[name]) for name in names},
                }
                for shard in self.shards
            ],
        }
        (folder / INDEX_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ShardIndex | None:
        """The folder's index, None without one; see `read`."""
        path = folder / INDEX_NAME
        return cls.read(path, lambda: folder / RECORDS_NAME) if path.exists() else None

    @classmethod
    def read(cls, path: Path, records_path: Callable[[], Path]) -> ShardIndex | None:
        """An index from its two files; None for one of an older version, in whose place tars are scanned.

        Nothing but the list of shards is read; records are mapped and made when they are asked for. Raises
        ValueError naming the file when it is not one of ours.
        """
        from hovle_data.stored_records import RecordFile, StoredRecords

        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
            if content["version"] < INDEX_VERSION:
                return None
            if content["version"] > INDEX_VERSION:
                raise ValueError(f"version {content['version']}, this hovle-data reads {INDEX_VERSION}")
            file = RecordFile(records_path(), content["fields"], content["sha256"])
            shards, start = [], 0
            for shard in content["shards"]:
                stop = start + shard["samples"]
                counts = {n: c[start:stop] for n in COUNTS if (c := file.counts(n)) is not None}
                records = StoredRecords(file, start, stop)
                shards.append(ShardInfo(shard["name"], shard["bytes"], shard["sha256"], records, counts))
                start = stop
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(
                f"{path}: not a shard index ({error}); delete it and the tars are scanned instead"
            ) from error
        return cls(tuple(shards))


def combined_sha256(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_name(name: str) -> tuple[str, str] | None:
    """A member's name -> (key, field) as webdataset splits it, None where it has no field."""
    match = _NAME.match(name)
    return (match.group(1), match.group(2)) if match else None


# What tarfile raises on hostile headers: places beyond any file, sizes beyond any memory, a thousand long-name headers
# in a row, ... What was read before stays.
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError)


def _forward(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """A tar's members; tarfile follows a negative size backwards, and round for ever (CVE-2025-8194)."""
    end = -1
    for info in tar:
        if info.size < 0 or tar.offset <= end:
            raise tarfile.ReadError("a header that points backwards")
        end = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header
        yield info


def scan_shard(path: Path) -> tuple[tuple[Record, ...], str | None]:
    """`scan_tar` of a file on this machine."""
    with path.open("rb") as file:
        return scan_tar(file, path.stat().st_size)


def scan_tar(file: BinaryIO, size: int) -> tuple[tuple[Record, ...], str | None]:
    """Read a tar's headers -> its records, and what is wrong with the tar (None: it is whole).

    Like webdataset, consecutive members with one key are one sample. The record that the damage cuts has its
    `problem` set; what lies behind it cannot be found. So has a record with a member that holds no bytes of its own
    (a link, also one that tar made of a file that was there twice): without it, it is another sample.
    """
    records: list[Record] = []
    key, members = "", list[Member]()
    problem: str | None = None
    link: str | None = None

    def finish() -> None:
        nonlocal link
        if members or link:
            record = Record(key, tuple(members), link)
            records.append(record if record.end() <= size else Record(key, record.members, "truncated shard"))
            members.clear()
        link = None

    try:
        # ":" = uncompressed only: a compressed tar has no offsets
        with tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for info in _forward(tar):
                    names = split_name(info.name)
                    if names is None or info.isdir():
                        continue
                    if names[0] != key:
                        finish()
                        key = names[0]
                    if info.isreg() and not info.issparse():
                        members.append(Member(names[1], info.offset_data, info.size))
                    else:
                        link = f"no plain file in the tar: {info.name}"
            except _TAR_ERRORS as error:
                problem = str(error) or type(error).__name__
            offset = min(max(0, tar.offset), size)  # damaged sizes lead anywhere
    except _TAR_ERRORS as error:
        file.seek(0)
        compressed = file.read(6).startswith(_COMPRESSED)
        what = "compressed, decompress it first" if compressed else str(error) or type(error).__name__
        return (), f"unreadable shard: {what}"
    finish()
    file.seek(offset)  # tarfile ends quietly at a header it cannot read; a whole tar ends with zeros
    end = file.read(BLOCK)
    if problem is None and end != bytes(BLOCK):
        problem = "no end-of-archive block" if end.strip(b"\0") == b"" else "broken header"
    if problem is not None and records:
        # it may have had more members: a picture without its text is not the sample
        records[-1] = replace(records[-1], problem="truncated shard")
    return tuple(records), problem and f"damaged shard: {problem} near byte {offset} of {size}"
