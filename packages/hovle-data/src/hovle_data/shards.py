"""WebDataset shards: plain tars, written by webdataset, readable by any of its readers, opened by byte offset.

`records` says how a sample becomes members of a tar, `index` where they lie in it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hovle_core.images import MAX_FILE_BYTES
from hovle_data.index import (
    BLOCK,
    INDEX_NAME,
    RECORDS_NAME,
    Record,
    ShardIndex,
    ShardInfo,
    combined_sha256,
    file_sha256,
    scan_shard,
    scan_tar,
)
from hovle_data.records import from_fields, to_fields
from hovle_data.schema import BadSample, Sample
from hovle_data.storage import FileState, is_url, open_folder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w-]+")


def write_shards(
    samples: Iterable[Sample],
    out: str | Path,
    samples_per_shard: int = 1000,
    name: str = "shard",
    progress: Callable[[int], None] | None = None,
) -> ShardIndex:
    """Write samples into `out`/{name}-000000.tar, ... and `out`/index.json; the folder appears whole or not at all.

    The same samples give the same bytes. `progress` is called with the number of samples written so far.
    Raises `BadSample` for a record that no stream could use, a key that webdataset would cut (dot, slash), a
    key given twice, or a picture of unknown format; ValueError when `out` exists (reuse is for the caller to
    decide) or nothing came.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"out={out} exists; remove it, or reuse it with ShardSource({str(out)!r})")
    if not _NAME.fullmatch(name):
        raise ValueError(f"name={name!r}: use letters, digits, '-' and '_'")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard}: give at least 1")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}-{token_hex(4)}")
    temporary.mkdir(parents=True)
    keys: set[str] = set()

    def checked(sample: Sample) -> dict[str, str | bytes]:
        if sample.key in keys:
            raise BadSample(sample.key, "", "key given twice")
        keys.add(sample.key)
        return to_fields(sample)

    written = None if progress is None else lambda: progress(len(keys))
    try:
        shards: list[ShardInfo] = []
        rest = map(checked, samples)
        while part := list(islice(rest, 1)):
            path = temporary / f"{name}-{len(shards):06d}.tar"
            shards.append(write_shard(chain(part, islice(rest, samples_per_shard - 1)), path, written))
        if not keys:
            raise ValueError(f"no samples for {out}: give at least one")
        index = ShardIndex(tuple(shards))
        index.save(temporary)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return index


def write_shard(
    samples: Iterable[dict[str, str | bytes]], path: Path, written: Callable[[], object] | None = None
) -> ShardInfo:
    """Write one tar of samples as `records.to_fields` gives them, calling `written` after each.

    The same samples give the same bytes.
    """
    import webdataset  # imports torch: 2 s that a reader does not need

    # webdataset opens no path itself: with WDS_SECURE=1 it would refuse to
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
            if written is not None:
                written()
    records, problem = scan_shard(path)
    assert problem is None, problem
    return ShardInfo(path.name, path.stat().st_size, file_sha256(path), records)


class ShardSource:
    """A folder of tars as a sequence of samples: `source[i]` is one seek and one read, for any i.

    Reads what `write_shards` and `hovle data build` write and anyone's webdataset tars (K.json or K.txt, pictures
    by suffix in natural order). Without an index.json, or for a tar that the index does not describe, the tar's
    headers are scanned on opening. A damaged or missing tar is logged and listed in `problems`; its readable
    samples stay, each lost one raises `BadSample` (shard, key, reason) when it is read. Holds no open file:
    picklable, forkable, safe to use from threads.

    path: a folder, one .tar, or the fsspec URL of either.
    name: prefix of keys in batches, unique within a mixture; the folder's name when not given.
    cache_gib, storage_options: of a URL, see `storage.RemoteFolder`.
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        cache_gib: float | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        folder, only = str(path), None
        if folder.endswith(".tar"):
            folder, only = (folder.rpartition("/")[0] or "."), folder.rpartition("/")[2]
        self.path = path if is_url(path) else Path(path)
        self.folder = open_folder(folder, cache_gib, storage_options)
        self.name = name or (only.removesuffix(".tar") if only else self.folder.name)
        if not self.folder.exists():
            raise ValueError(f"path={path} is no folder; give a folder of .tar shards")
        self.problems: list[str] = []
        self._sha256: str | None = None
        self._shards = self._open(only)
        if not self._shards:
            raise ValueError(f"path={path} holds no .tar; give a folder of .tar shards")
        for problem in self.problems:
            logger.warning("%s", problem)
        self._ends = list(accumulate(len(shard.records) for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        """Sample i, not validated beyond what reading it needs; `BadSample` names shard, key and reason."""
        shard, record = self._locate(i)
        where = self._where(shard)
        if record.problem is not None:
            raise BadSample(record.key, where, record.problem)
        return from_fields(record.key, where, self._read(shard, record, where))

    def key(self, i: int) -> str:
        """Key of sample i, without reading it."""
        return self._locate(i)[1].key

    def where(self, i: int) -> str:
        """The shard of sample i, "<name>/<file>", as a `BadSample` names it."""
        return self._where(self._shards[self._number(i)])

    def manifest(self) -> dict[str, Any]:
        """{"shards", "samples", "sha256"}: what a run notes as its data. Tars without an index are hashed, once."""
        if self._sha256 is None:
            self._sha256 = combined_sha256(self._hashes())
        return {"shards": len(self._shards), "samples": len(self), "sha256": self._sha256}

    def _hashes(self) -> list[str]:
        hashes = []
        for shard in self._shards:
            try:
                hashes.append(shard.sha256 or file_sha256(self.folder.local(shard.name)))
            except FileNotFoundError:
                hashes.append("missing")
        return hashes

    def counts(self, name: str) -> NDArray[np.int32] | None:
        """Per-sample `[samples]` "tokens" or "tiles" as a build with a processor counted them, None without."""
        if not all(name in shard.counts for shard in self._shards):
            return None
        return np.concatenate([np.asarray(shard.counts[name], np.int32) for shard in self._shards])

    def _where(self, shard: ShardInfo) -> str:
        return f"{self.name}/{shard.name}"

    def _number(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} is outside 0..{len(self) - 1} of {self.path}")
        return bisect_right(self._ends, i % len(self))

    def _locate(self, i: int) -> tuple[ShardInfo, Record]:
        number = self._number(i)
        shard = self._shards[number]
        return shard, shard.records[i % len(self) - self._ends[number] + len(shard.records)]

    def _open(self, only: str | None) -> list[ShardInfo]:
        """All shards by name: from the index where it fits the file, scanned where it does not."""
        index, index_time = self._load_index()
        indexed = {shard.name: shard for shard in index.shards} if index else {}
        files = self.folder.files(".tar")
        names = [name for name in sorted(files.keys() | indexed.keys()) if only in (None, name)]
        return [self._open_shard(n, indexed.get(n), files.get(n), index_time) for n in names]

    def _load_index(self) -> tuple[ShardIndex | None, float]:
        """The folder's index, and when it was written."""
        try:
            path = self.folder.local(INDEX_NAME)
        except FileNotFoundError:
            return None, 0.0
        written = path.stat().st_mtime
        return ShardIndex.read(path, lambda: self.folder.local(RECORDS_NAME)), written

    def _open_shard(
        self, name: str, indexed: ShardInfo | None, file: FileState | None, index_time: float
    ) -> ShardInfo:
        if file is None:
            assert indexed is not None
            self.problems.append(f"{self.name}/{name}: missing shard: {len(indexed.records)} samples")
            return indexed
        if indexed is not None and self._fits(indexed, file, index_time):
            return indexed
        with self.folder.open(name) as opened:
            records, problem = scan_tar(opened, file.size)
        if problem is None:
            return ShardInfo(name, file.size, "", (*records, *self._lost(name, indexed, records)))
        self.problems.append(f"{self.name}/{name}: {problem}")
        if indexed is not None:  # the index still names what is lost
            return indexed
        if not any(record.problem for record in records):  # one record stands for what cannot be found
            records = (*records, Record("?", (), problem))
        return ShardInfo(name, file.size, "", records)

    def _lost(self, name: str, indexed: ShardInfo | None, found: Sequence[Record]) -> list[Record]:
        """What the index names and the tar, whole in itself, lacks: each is bad by name. A tar that shares nothing with
        the index was put in its place."""
        keys = {record.key for record in found}
        missing = [] if indexed is None else [r.key for r in indexed.records if r.key not in keys]
        if indexed is None or not missing or len(missing) == len(indexed.records):
            return []
        self.problems.append(f"{self.name}/{name}: lacks {len(missing)} samples that index.json names")
        return [Record(key, (), "named by index.json, not in its shard") for key in missing]

    def _fits(self, indexed: ShardInfo, file: FileState, index_time: float) -> bool:
        """Whether the index describes the file: it has that size, and nobody touched it since, or its first and last
        sample begin where the index says. (Each sample's own header is looked at again when it is read.)"""
        if indexed.size != file.size:
            return False
        if file.mtime is None or file.mtime <= index_time:
            return True
        for record in (indexed.records[0], indexed.records[-1]) if len(indexed.records) else ():
            member = record.members[-1]
            header = self.folder.read(indexed.name, member.offset - BLOCK, member.offset)
            if not _is_header(header, record.key, member.size):
                return False
        return bool(len(indexed.records))

    def changed(self) -> Iterator[str]:
        """Reads all tars whose SHA-256 the index knows: a line for each whose bytes are others."""
        for shard in self._shards:
            if not shard.sha256:
                continue
            try:
                digest = hashlib.sha256()
                with self.folder.open(shard.name) as opened:
                    while part := opened.read(2**20):
                        digest.update(part)
            except OSError:
                continue  # named already, as missing or by each of its samples
            if digest.hexdigest() != shard.sha256:
                yield f"{self.name}/{shard.name}: changed since it was indexed: its SHA-256 is another"

    def _read(self, shard: ShardInfo, record: Record, where: str) -> dict[str, bytes]:
        """The members of one record: one read from the first member's header to the last one's end."""
        for member in record.members:
            if member.size > MAX_FILE_BYTES:
                raise BadSample(record.key, where, f"file too large: {record.key}.{member.field}")
        start = min(member.offset for member in record.members) - BLOCK
        try:
            data = self.folder.read(shard.name, start, record.end())
        except FileNotFoundError as error:
            raise BadSample(record.key, where, "missing shard") from error
        except OSError as error:
            raise BadSample(record.key, where, f"unreadable shard: {error}") from error
        fields = {}
        for member in record.members:
            if member.field in fields:  # which one is meant?
                raise BadSample(record.key, where, f"file given twice: {record.key}.{member.field}")
            begin = member.offset - start
            if begin + member.size > len(data):
                raise BadSample(record.key, where, "truncated shard")
            if not _is_header(data[begin - BLOCK : begin], record.key, member.size):
                raise BadSample(
                    record.key, where, "shard and index differ: delete index.json to have it scanned"
                )
            fields[member.field] = data[begin : begin + member.size]
        return fields


def _is_header(block: bytes, key: str, size: int) -> bool:
    plain = block[257:262] == b"ustar" and block[345] == 0 and block[124:136] == b"%011o\0" % size
    if plain and block.startswith(key.encode("utf-8", "surrogateescape") + b"."):
        return True  # as nearly all are: tarfile's parser would take as long as all the rest of a read
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    # The block holds at most 100 bytes, in some formats only ASCII; other names are in a header before it.
    return info.size == size and (len(key) > 90 or not key.isascii() or info.name.startswith(key + "."))
