"""A second home for checkpoints, on any fsspec file system: what a machine that is gone cannot take with it.

What is there is whole once its last file, which lists the others with their hashes, is: object stores have no rename.
Of a checkpoint that is its state, of a finished run `copied.json`. Everything is copied by rank 0 between two steps.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec

from hovle_train import checkpoint
from hovle_train.config import Recipe
from hovle_train.export import finish
from hovle_train.lineage import DataManifest, check_made_by, checked_hash, parent_of
from hovle_train.runs import (
    CHECKPOINTS,
    FINAL,
    FINAL_EMA,
    METRICS_FILE,
    RECIPE_FILE,
    SUMMARY_FILE,
    is_finished,
)

logger = logging.getLogger(__name__)

# Written behind all else of a finished run: SHA-256 by file.
COPIED = "copied.json"
# Bad samples of all ranks, and of each: a run that goes on elsewhere names them still.
QUARANTINE, QUARANTINES = "quarantine.jsonl", "quarantine*.jsonl"


class RemoteRun:
    """The copy of a run in `url` (s3://bucket/prefix, file:///mnt/store, memory://x; or a path).

    Raises ValueError naming the setting where fsspec knows no such file system or lacks the package for it.
    """

    def __init__(self, url: str):
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"train.storage_path {url!r}: {error} (S3 needs the extra hovle-data[s3])"
            ) from error
        self._fs: Any = fs
        self.url = url
        self.root: str = root.rstrip("/")

    def check(self) -> None:
        """Raise ValueError naming the setting where nothing can be written: before the first step, not behind it."""
        probe = f"{self.root}/.hovle-can-write"
        try:
            self._fs.makedirs(self.root, exist_ok=True)
            self._fs.pipe_file(probe, b"")
            self._fs.rm(probe)
        except Exception as error:  # every file system has its own
            raise ValueError(
                f"train.storage_path {self.url!r} cannot be written to: {type(error).__name__}: {error}"
            ) from error

    def push(self, path: Path, run_dir: Path, keep: int) -> None:
        """Copy a checkpoint, and metrics and bad samples so far; then drop all but it and the `keep - 1` before it that
        are whole."""
        target = f"{self.root}/{CHECKPOINTS}/{path.name}"
        if self._fs.exists(target):
            self._fs.rm(target, recursive=True)
        files = sorted(
            path.iterdir(), key=lambda file: file.name == checkpoint.STATE
        )  # the list of the others last
        for file in files:
            self._put(file, f"{target}/{file.name}")
        for file in (run_dir / METRICS_FILE, *run_dir.glob(QUARANTINES)):
            self._put(file, f"{self.root}/{file.name}")
        names = self._names(CHECKPOINTS)
        whole = [
            n
            for n in names
            if n < path.name and self._fs.exists(f"{self.root}/{CHECKPOINTS}/{n}/{checkpoint.STATE}")
        ]
        kept = {path.name, *whole[::-1][: keep - 1]}
        self._drop(*(f"{CHECKPOINTS}/{name}" for name in names if name not in kept))

    def push_final(self, run_dir: Path) -> None:
        """Copy what a finished run leaves, unless a whole copy of it is there; drop what only resuming needed."""
        # Its summary is no other run's: it has the hash of the weights, and when they were finished.
        if self._copied().get(SUMMARY_FILE) != checkpoint.file_hash(run_dir / SUMMARY_FILE):
            files = [run_dir / name for name in (METRICS_FILE, RECIPE_FILE, SUMMARY_FILE, QUARANTINE)]
            files += [*(run_dir / FINAL).rglob("*"), *(run_dir / FINAL_EMA).rglob("*")]
            found = {path.relative_to(run_dir).as_posix(): path for path in files if path.is_file()}
            self._drop(COPIED, FINAL, FINAL_EMA, QUARANTINE)  # more shards, maybe, than there are now
            for name, path in found.items():
                self._put(path, f"{self.root}/{name}")
            hashes = {name: checkpoint.file_hash(path) for name, path in found.items()}
            self._fs.pipe_file(f"{self.root}/{COPIED}", json.dumps(hashes, indent=1).encode())
        self._drop(CHECKPOINTS, *(name for name in self._names() if name.startswith("quarantine-rank")))

    def pull_final(self, recipe: Recipe) -> None:
        """Bring a finished run of which a whole copy is there, unless the recipe's folder has one.

        A damaged one is passed over with a warning. Raises ValueError for one of another recipe, or from a parent that
        is another now: nothing would be trained.
        """
        hashes = {} if is_finished(recipe.path) else self._copied()
        if not hashes:
            return
        temporary = recipe.path / f".fetching-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            if not self._fetch(SUMMARY_FILE, hashes, temporary):
                return
            card = json.loads((temporary / SUMMARY_FILE).read_text())
            self._check(card, recipe, f"finished run {self.url}", data={})
            if not all(self._fetch(name, hashes, temporary) for name in hashes):
                return
            checkpoint.sync_folder(temporary / FINAL)
            for file in temporary.iterdir():
                if file.is_file():
                    os.replace(file, recipe.path / file.name)
            finish(temporary / FINAL, temporary / FINAL_EMA, recipe.path)
            logger.info("fetched the finished run from %s", self.root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def pull(self, recipe: Recipe, data: DataManifest | None = None) -> None:
        """Bring the newest whole checkpoint, metrics and bad samples, unless the run's folder has one as new.

        A torn or damaged one is passed over with a warning. Raises ValueError for one of another recipe, or from a
        parent or data that are others now. data: as for `lineage.check_made_by`.
        """
        here = checkpoint.newest(recipe.path / CHECKPOINTS)
        for name in reversed(self._names(CHECKPOINTS)):
            if here is not None and here.name >= name:
                return
            temporary = recipe.path / CHECKPOINTS / f".fetching-{os.getpid()}"
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                if self._pull_one(name, temporary, recipe, data):
                    return
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _pull_one(self, name: str, temporary: Path, recipe: Recipe, data: DataManifest | None) -> bool:
        """Bring the checkpoint `name`, by way of a folder beside; whether it is whole. Raises as `pull`."""
        fetched = temporary / name
        fetched.mkdir(parents=True)
        for file in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE):
            source = f"{self.root}/{CHECKPOINTS}/{name}/{file}"
            if self._fs.exists(source):
                self._fs.get_file(source, str(fetched / file))
        if checkpoint.newest(temporary) is None:
            return False
        what = f"checkpoint {self.url}/{CHECKPOINTS}/{name}"
        self._check(checkpoint.read_state(fetched), recipe, what, data)
        target = recipe.path / CHECKPOINTS / name
        shutil.rmtree(target, ignore_errors=True)
        os.replace(fetched, target)
        for file in self._names():
            if file == METRICS_FILE or file.startswith("quarantine"):
                self._fs.get_file(f"{self.root}/{file}", str(recipe.path / file))
        logger.info("fetched %s from %s", name, self.root)
        return True

    def _check(self, card: dict[str, Any], recipe: Recipe, what: str, data: DataManifest | None) -> None:
        try:
            check_made_by(card, recipe, checked_hash(parent_of(recipe)), data, what)
        except ValueError as error:
            raise ValueError(
                f"{error}. That is the copy in train.storage_path: name another place, or delete it as well"
            ) from None

    def _copied(self) -> dict[str, str]:
        """SHA-256 by file of the finished run there; empty without a whole one."""
        try:
            hashes = dict(json.loads(self._fs.cat_file(f"{self.root}/{COPIED}")))
        except (FileNotFoundError, NotADirectoryError, TypeError, ValueError):  # not there, or cut short
            return {}
        if outside := [name for name in hashes if name.startswith("/") or ".." in name.split("/")]:
            raise ValueError(
                f"train.storage_path {self.url}: {COPIED} names {outside[0]!r}, outside of the run"
            )
        return hashes

    def _fetch(self, name: str, hashes: dict[str, str], folder: Path) -> bool:
        """Bring one file of a finished run; whether it is what was copied."""
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._fs.get_file(f"{self.root}/{name}", str(target))
            whole = checkpoint.file_hash(target) == hashes[name]
        except FileNotFoundError:
            whole = False
        if not whole:
            logger.warning("the finished run in %s is damaged (%s): training again", self.root, name)
        return whole

    def _names(self, folder: str = "") -> list[str]:
        """What is in the copy or a folder of it, in order: checkpoints, oldest first, whole or not."""
        path = f"{self.root}/{folder}".rstrip("/")
        self._fs.invalidate_cache()  # another process may have written since
        if not self._fs.exists(path):
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(path, detail=False))

    def _drop(self, *names: str) -> None:
        self._fs.invalidate_cache()
        for path in (f"{self.root}/{name}" for name in names):
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def _put(self, file: Path, target: str) -> None:
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._fs.put_file(str(file), target)
