"""The records of an index as arrays in a file that is mapped, not read: a million samples open in milliseconds."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from operator import eq
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hovle_data.index import Member, Record

Array = NDArray[Any]
ARRAYS = ("key_bytes", "key_ends", "member_ends", "fields", "offsets", "sizes")


def save_records(path: Path, records: Iterable[Record], counts: dict[str, Array], digest: str) -> list[str]:
    """Write all records and per-sample `counts` (such as "tokens") as safetensors; returns the table of field names.

    digest: noted in the file, so that `StoredRecords` can tell that it belongs to its index.json.
    """
    from safetensors.numpy import save_file

    table: dict[str, int] = {}
    keys = bytearray()
    key_ends, member_ends, fields, offsets, sizes = (array("q") for _ in range(5))
    for record in records:
        keys += record.key.encode("utf-8", "surrogateescape")
        key_ends.append(len(keys))
        for member in record.members:
            fields.append(table.setdefault(member.field, len(table)))
            offsets.append(member.offset)
            sizes.append(member.size)
        member_ends.append(len(fields))
    arrays: dict[str, Array] = {
        "key_bytes": np.frombuffer(keys, np.uint8),
        "key_ends": np.asarray(key_ends, np.int64),
        "member_ends": np.asarray(member_ends, np.int64),
        "fields": np.asarray(fields, np.uint32),
        "offsets": np.asarray(offsets, np.int64),
        "sizes": np.asarray(sizes, np.int64),
    }
    save_file({**arrays, **counts}, path, metadata={"sha256": digest})
    return list(table)


class RecordFile:
    """The arrays of one index.safetensors, mapped. Pickles as its path: a process that gets it maps it again.

    Raises ValueError for a file that is no safetensors, or of another index (`digest`).
    """

    def __init__(self, path: Path, table: Sequence[str], digest: str) -> None:
        self.path, self.table, self.digest = path, tuple(table), digest
        header, start = _header(path)
        if header.pop("__metadata__", {}).get("sha256") != digest:
            raise ValueError(f"{path.name} belongs to another index.json")
        self._arrays = {name: _mapped(path, entry, start) for name, entry in header.items()}
        if missing := [name for name in ARRAYS if name not in self._arrays]:
            raise ValueError(f"{path.name} lacks {missing}")

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordFile, (self.path, self.table, self.digest)

    def __len__(self) -> int:
        return len(self._arrays["key_ends"])

    def counts(self, name: str) -> Array | None:
        """Per-sample numbers `[samples]` such as "tokens" and "tiles", None if the index has none."""
        return self._arrays.get(name) if name not in ARRAYS else None

    def record(self, i: int) -> Record:
        arrays = self._arrays
        key = slice(int(arrays["key_ends"][i - 1]) if i else 0, int(arrays["key_ends"][i]))
        of = slice(int(arrays["member_ends"][i - 1]) if i else 0, int(arrays["member_ends"][i]))
        members = zip(
            arrays["fields"][of].tolist(),
            arrays["offsets"][of].tolist(),
            arrays["sizes"][of].tolist(),
            strict=True,
        )
        return Record(
            arrays["key_bytes"][key].tobytes().decode("utf-8", "surrogateescape"),
            tuple(Member(self.table[number], offset, size) for number, offset, size in members),
        )


class StoredRecords(Sequence[Record]):
    """Records start..stop-1 of a file: those of one shard. Each is made when it is asked for."""

    def __init__(self, file: RecordFile, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(file):
            raise ValueError(f"records {start}..{stop} of {len(file)}")
        self.file, self.start, self.stop = file, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, i: int, /) -> Record: ...
    @overload
    def __getitem__(self, i: slice, /) -> Sequence[Record]: ...
    def __getitem__(self, i: int | slice, /) -> Record | Sequence[Record]:
        if isinstance(i, slice):
            return [self.file.record(self.start + j) for j in range(len(self))[i]]
        return self.file.record(self.start + range(len(self))[i])  # range checks the bounds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file (8 bytes of length, header, data), and where its data begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size < path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file")
        return json.loads(file.read(size)), 8 + size


def _mapped(path: Path, entry: dict[str, Any], start: int) -> Array:
    dtype = np.dtype({"U8": "<u1", "U32": "<u4", "I32": "<i4", "I64": "<i8"}[entry["dtype"]])
    begin, end = entry["data_offsets"]
    if begin == end:  # nothing can be mapped of nothing
        return np.zeros(0, dtype)
    mapped = np.memmap(path, dtype, "r", start + begin, shape=((end - begin) // dtype.itemsize,))
    return np.asarray(mapped)  # the same memory, without the price of a subclass at every look into it
