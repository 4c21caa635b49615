"""Files of a folder, on this machine or behind any fsspec URL (s3://, gs://, http://, memory://, ...)."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import shutil
import time
from pathlib import Path, PurePosixPath
from secrets import token_hex
from stat import S_ISREG
from typing import Any, BinaryIO, NamedTuple, cast

from hovle_core.images import MAX_FILE_BYTES

logger = logging.getLogger(__name__)

GIB = 2**30
PAUSES = (
    0.5,
    2.0,
)  # seconds before a read that failed is tried again: a store's hiccup must not cost a sample
ABANDONED = 3600  # seconds after which an unfinished download is nobody's


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def printable(name: str) -> str:
    """A file's name as text: what is no UTF-8 in it (old disks have Latin-1) is spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()


def cache_folder() -> Path:
    """Where copies of remote files lie: $HOVLE_CACHE, else ~/.cache/hovle. Deleting it is always safe."""
    return Path(os.environ.get("HOVLE_CACHE") or Path.home() / ".cache" / "hovle")


class FileCache:
    """Whole remote files, copied once; those used longest ago go when all take more than `max_bytes`.

    A copy appears whole or not at all and processes may share the folder, neither of which fsspec's simplecache
    promises; it has no bound either. A file that changed at its origin is another file here.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def local(self, fs: Any, path: str) -> Path:
        """The local copy. Raises OSError when the file cannot be had."""
        with self.open(fs, path) as file:
            return Path(file.name)

    def open(self, fs: Any, path: str) -> BinaryIO:
        """The local copy, open: it can be read whoever makes room meanwhile. Raises OSError as `local` does."""
        name = hashlib.sha256(f"{fs.unstrip_protocol(path)} {fs.ukey(path)}".encode()).hexdigest()[:32]
        copy = self.folder / (name + PurePosixPath(path).suffix)
        for _ in range(4):
            try:
                file = copy.open("rb")
                os.utime(file.fileno())  # used now
                return file
            except FileNotFoundError:  # not there yet, or not any more
                self._download(fs, path, copy)
        raise OSError(f"{path}: copies in {self.folder} go before they can be opened; raise cache_gib")

    def clear(self) -> int:
        """Delete all copies; returns how many bytes they took."""
        freed = sum(size for _, size, _ in self._files())
        shutil.rmtree(self.folder, ignore_errors=True)
        return freed

    def _download(self, fs: Any, path: str, copy: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        size = fs.size(path)
        self._make_room(size or 0)
        part = copy.with_name(f"{copy.name}.{os.getpid()}-{token_hex(4)}.part")
        try:
            fs.get_file(path, str(part))
            if size is not None and part.stat().st_size != size:
                raise OSError(f"{path}: {part.stat().st_size} of {size} bytes arrived")
            part.replace(copy)
        finally:
            part.unlink(missing_ok=True)

    def _files(self) -> list[tuple[float, int, str]]:
        if not self.folder.is_dir():
            return []
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another process made room meanwhile
                    continue
                if not entry.name.endswith(".part") or stat.st_mtime < time.time() - ABANDONED:
                    found.append((stat.st_mtime, stat.st_size, entry.path))
        return sorted(found)

    def _make_room(self, wanted: int) -> None:
        files = self._files()
        excess = sum(size for _, size, _ in files) + wanted - self.max_bytes
        for _, size, path in files:
            if excess <= 0:
                return
            Path(path).unlink(missing_ok=True)  # whoever has it open reads on
            excess -= size


class FileState(NamedTuple):
    """Size in bytes, and when it was written last (None: a store's clock is not ours)."""

    size: int
    mtime: float | None


class Folder:
    """A local folder. `read`, `open` and `local` raise FileNotFoundError or another OSError."""

    def __init__(self, path: str | Path) -> None:
        self.path: str | Path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return Path(self.path).resolve().name

    def exists(self) -> bool:
        return Path(self.path).is_dir()

    def files(self, suffix: str) -> dict[str, FileState]:
        """The files here (not in sub-folders) whose name ends so."""
        with os.scandir(self.path) as entries:
            found = [(e.name, e.stat()) for e in entries if e.name.endswith(suffix) and e.is_file()]
        return {name: FileState(stat.st_size, stat.st_mtime) for name, stat in found}

    def walk(self, suffixes: tuple[str, ...]) -> list[str]:
        """Names of all files here and below that end so, relative and with "/", sorted. Links are followed, and no
        folder is walked twice."""
        found, walked = [], set[str]()
        for root, folders, names in os.walk(self.path, followlinks=True):
            real = os.path.realpath(root)
            if real in walked:
                folders.clear()
                continue
            walked.add(real)
            folders.sort()
            below = os.path.relpath(root, self.path).replace(os.sep, "/")
            found += [n if below == "." else f"{below}/{n}" for n in names if n.lower().endswith(suffixes)]
        return sorted(found)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start..stop-1 of a file; fewer where it ends before. A whole file only if it is no larger than pictures
        are."""
        path = os.path.join(self.path, name)
        _check_is_file(path)
        with io.FileIO(path) as file:  # one read of all: a buffer would only cost
            return _read(file, start, stop)

    def open(self, name: str) -> BinaryIO:
        return self.local(name).open("rb")

    def local(self, name: str) -> Path:
        """A path on this machine that holds the file."""
        path = Path(self.path) / name
        _check_is_file(path)
        return path


def _check_is_file(path: str | Path) -> None:
    if not S_ISREG(os.stat(path).st_mode):  # a pipe would keep its reader waiting, a device never ends
        raise OSError(f"{path} is no file, but a folder, a pipe or a device")


def _read(file: BinaryIO | io.FileIO, start: int, stop: int | None) -> bytes:
    if stop is None and os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
        raise OSError(f"file too large: more than {MAX_FILE_BYTES >> 20} MiB")
    file.seek(start)
    return file.read(-1 if stop is None else stop - start)


class RemoteFolder(Folder):
    """A folder behind an fsspec URL.

    cache_gib: None reads byte ranges, one request a sample, and keeps nothing: right for a random order over more
        than fits on the disk. A number copies each file whole on first use and keeps that many GiB of them.
    storage_options: for the file system, such as {"endpoint_url": ...} for s3.
    """

    def __init__(
        self, url: str, cache_gib: float | None = None, storage_options: dict[str, Any] | None = None
    ) -> None:
        self.path = url.rstrip("/")
        self.fs, self.root = _filesystem(self.path, storage_options or {})
        self.keeps = cache_gib is not None
        self.cache = FileCache(cache_folder() / "files", int((10 if cache_gib is None else cache_gib) * GIB))

    @property
    def name(self) -> str:
        return PurePosixPath(self.root).name

    def exists(self) -> bool:
        return bool(self._try(self.fs.exists, self.root))

    def files(self, suffix: str) -> dict[str, FileState]:
        found = self._try(self.fs.ls, self.root, detail=True, refresh=True)
        return {
            PurePosixPath(entry["name"]).name: FileState(int(entry["size"] or 0), None)
            for entry in found
            if entry["type"] == "file" and entry["name"].endswith(suffix)
        }

    def walk(self, suffixes: tuple[str, ...]) -> list[str]:
        found = self._try(self.fs.find, self.root)
        names = [path.removeprefix(self.root).lstrip("/") for path in found]
        return sorted(name for name in names if name.lower().endswith(suffixes))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if self.keeps:
            with self.open(name) as file:
                return _read(file, start, stop)
        path = f"{self.root}/{name}"
        try:
            return cast(bytes, self._patiently(self.fs.cat_file, path, start=start, end=stop))
        except OSError as error:
            if (
                error.errno == errno.EINVAL and self._try(self.fs.size, path) <= start
            ):  # S3 refuses such a range
                return b""
            raise

    def open(self, name: str) -> BinaryIO:
        if self.keeps:
            return cast(BinaryIO, self._patiently(self.cache.open, self.fs, f"{self.root}/{name}"))
        return cast(BinaryIO, self._try(self.fs.open, f"{self.root}/{name}", "rb"))

    def local(self, name: str) -> Path:
        return cast(Path, self._patiently(self.cache.local, self.fs, f"{self.root}/{name}"))

    def _patiently(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """`_try`, again after each of PAUSES unless the store has made plain that it is no use."""
        for pause in PAUSES:
            try:
                return self._try(call, *args, **kwargs)
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:
                if error.errno == errno.EINVAL:  # what is asked for is wrong, and stays so
                    raise
                logger.warning("%s; trying again in %s s", error, pause)
                time.sleep(pause)
        return self._try(call, *args, **kwargs)

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except OSError:
            raise
        except (
            Exception
        ) as error:  # clients of stores raise their own: botocore's EndpointConnectionError, ...
            raise OSError(f"{self.path}: {type(error).__name__}: {error}") from error


def open_folder(
    path: str | Path, cache_gib: float | None = None, storage_options: dict[str, Any] | None = None
) -> Folder:
    """The folder at a path or URL. Raises ValueError for a protocol that nothing installed speaks."""
    return RemoteFolder(str(path), cache_gib, storage_options) if is_url(path) else Folder(path)


class LocalFile:
    """A file given by path or URL, on this machine; copied anew where the cache has forgotten it.

    Raises FileNotFoundError or ValueError naming it.
    """

    def __init__(self, path: str | Path, storage_options: dict[str, Any] | None = None) -> None:
        self.path, self.storage_options = str(path), storage_options
        self.local = local_file(path, storage_options)

    def open(self) -> BinaryIO:
        try:
            return self.local.open("rb")
        except FileNotFoundError:
            self.local = local_file(self.path, self.storage_options)
            return self.local.open("rb")


def local_file(path: str | Path, storage_options: dict[str, Any] | None = None) -> Path:
    """A path on this machine for a file given by path or URL. Raises FileNotFoundError or ValueError naming it."""
    if not is_url(path):
        if not Path(path).is_file():
            raise FileNotFoundError(2, "No such file", str(path))
        return Path(path)
    folder, _, name = str(path).rpartition("/")
    try:
        return open_folder(folder, storage_options=storage_options).local(name)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _filesystem(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(url, **options)
    except ImportError as error:  # fsspec's own sentence names the package
        hint = " (pip install 'hovle-data[s3]')" if url.startswith("s3") else ""
        raise ValueError(f"path={url}: {error}{hint}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"path={url}: {error}") from error
    return fs, path
