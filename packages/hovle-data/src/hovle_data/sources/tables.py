"""Tables: Parquet files, and Hugging Face `datasets` saved to disk (extras: parquet, datasets)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hovle_data.schema import BadSample, Sample
from hovle_data.sources.chats import read_image
from hovle_data.sources.rows import parse_row
from hovle_data.sources.spans import Chained
from hovle_data.storage import Folder, LocalFile, open_folder

FIELDS = ("id", "image", "images", "text", "caption", "messages", "conversations")


class ParquetSource:
    """A .parquet file or a folder of them. A row group is read at a time, so reading in order is fast.

    columns: our name -> the table's, for {"image", "text", "messages", "id"}; without it columns called so (or
        images, caption, conversations) are taken. A picture is its file's bytes, {"bytes", "path"}, a name
        relative to the table's folder, or a list of these.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Mapping[str, str] | None = None,
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        parquet = _optional("pyarrow.parquet", "parquet")
        self.name = name or Path(str(path).rstrip("/")).stem
        if str(path).endswith(".parquet"):
            self.folder = open_folder(str(path).rpartition("/")[0] or ".", storage_options=storage_options)
            names = [str(path)]
        else:
            self.folder = open_folder(path, storage_options=storage_options)
            if not self.folder.exists():
                raise ValueError(f"path={path} is no folder; give a .parquet file or a folder of them")
            names = [f"{str(path).rstrip('/')}/{name}" for name in sorted(self.folder.files(".parquet"))]
        if not names:
            raise ValueError(f"path={path} holds no .parquet")
        self.groups: list[tuple[LocalFile, int, int]] = []  # file, row group, its first row in the file
        lengths = []
        for name in names:
            file, first = LocalFile(name, storage_options), 0
            metadata, schema = _footer(file, parquet)
            columns = _columns(columns, schema, name)
            for group in range(metadata.num_row_groups):
                self.groups.append((file, group, first))
                lengths.append(metadata.row_group(group).num_rows)
                first += lengths[-1]
        self.columns = dict(columns or {})
        self._chained = Chained(lengths)

    def __len__(self) -> int:
        return len(self._chained)

    def where(self, i: int) -> str:
        group, j = self._chained.locate(i)
        file, _, first = self.groups[group]
        return f"{file.path}:row {first + j}"

    def __getitem__(self, i: int) -> Sample:
        group, j = self._chained.locate(i)
        file, number, _ = self.groups[group]
        try:
            table = _row_group(file, number, tuple(self.columns.values()))
        except (OSError, ValueError) as error:  # pyarrow's own errors are one or the other
            raise BadSample(f"{i:08d}", self.where(i), f"unreadable row group: {error}") from error
        row = {ours: table.column(theirs)[j].as_py() for ours, theirs in self.columns.items()}
        return row_sample(row, f"{i:08d}", self.where(i), self.folder)


class DatasetsSource:
    """What `datasets.Dataset.save_to_disk` wrote; by URL it is copied first. split: of a DatasetDict.

    columns: see `ParquetSource`.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        columns: Mapping[str, str] | None = None,
        name: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        datasets = _optional("datasets", "datasets")
        self.folder = open_folder(path, storage_options=storage_options)
        try:
            table = datasets.load_from_disk(str(path), storage_options=storage_options)
        except FileNotFoundError as error:
            raise ValueError(
                f"path={path}: give a folder that Dataset.save_to_disk wrote ({error})"
            ) from error
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"split={split!r} of {path}: give one of {', '.join(table)}")
            table = table[split]
        self.name = name or self.folder.name
        self.path = str(path)
        self.columns = _columns(columns, table.features.arrow_schema, str(path))
        # arrow: rows as they are stored, pictures as their files' bytes
        self.table = table.select_columns(sorted(set(self.columns.values()))).with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def where(self, i: int) -> str:
        return f"{self.path}:row {i}"

    def __getitem__(self, i: int) -> Sample:
        i = range(len(self))[i]
        row = self.table[i].to_pylist()[0]
        return row_sample(
            {ours: row[theirs] for ours, theirs in self.columns.items()},
            f"{i:08d}", self.where(i), self.folder,
        )  # fmt: skip


def row_sample(row: dict[str, Any], key: str, where: str, folder: Folder) -> Sample:
    """A row with our column names -> Sample. Raises `BadSample`."""
    for name in ("messages", "conversations"):  # tables often hold them as JSON
        if isinstance(row.get(name), str):
            try:
                row[name] = json.loads(row[name])
            except (ValueError, RecursionError) as error:
                raise BadSample(key, where, f"bad json: {name}: {error}") from error
    parsed = parse_row(row, key, where)
    images = tuple(_image(cell, key, where, folder) for cell in parsed.images or ())
    meta = {} if parsed.id is None else {"id": parsed.id}
    return Sample(key, images, parsed.text, parsed.messages, meta)


def _image(cell: Any, key: str, where: str, folder: Folder) -> bytes:
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    return cell if isinstance(cell, bytes) else read_image(folder, cell, key, where)


def _columns(given: Mapping[str, str] | None, schema: Any, where: str) -> dict[str, str]:
    present = list(schema.names)
    if given is None:
        found = {name: name for name in FIELDS if name in present}
        files = [field.name for field in schema if field.name not in found and _holds_files(field.type)]
        if found and files and not {"image", "images"} & found.keys():
            raise ValueError(
                f"{where}: column {files[0]!r} holds bytes and would not be read; if they are pictures say "
                f"columns={ {**found, 'image': files[0]} }, and columns={found} if not"
            )
        if not found:
            raise ValueError(
                f"{where}: say which columns to read, columns={{'text': ...}}; there are {present}"
            )
        return found
    for ours, theirs in given.items():
        if ours not in FIELDS or theirs not in present:
            raise ValueError(
                f"columns={{{ours!r}: {theirs!r}}} of {where}: keys are {', '.join(FIELDS)}; columns are {present}"
            )
    return dict(given)


def _holds_files(kind: Any) -> bool:
    """Whether cells of this Arrow type are bytes, {"bytes", ...} or lists of them."""
    types = _optional("pyarrow", "parquet").types
    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_files(kind.value_type)
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _footer(file: LocalFile, parquet: Any) -> tuple[Any, Any]:
    """Metadata and schema. Raises ValueError naming a file that is no Parquet."""
    with file.open() as opened:
        try:
            table = parquet.ParquetFile(opened)
        except (ValueError, OSError) as error:  # pyarrow's own errors are one or the other
            raise ValueError(f"{file.path} is no Parquet file: {error}") from error
        return table.metadata, table.schema_arrow


@lru_cache(maxsize=2)
def _row_group(file: LocalFile, group: int, columns: tuple[str, ...]) -> Any:
    parquet = _optional("pyarrow.parquet", "parquet")
    with file.open() as opened:
        return parquet.ParquetFile(opened).read_row_group(group, columns=list(columns))


def _optional(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'hovle-data[{extra}]'") from error
