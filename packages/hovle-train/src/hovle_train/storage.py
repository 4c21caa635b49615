"""A second home for checkpoints, on any fsspec file system: what a machine that is gone cannot take with it.

A folder there is whole once its last file, which lists the others with sizes and hashes, is: object stores have no
rename. Everything is copied by rank 0 between two steps.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec

from hovle_train import checkpoint
from hovle_train.runs import FINAL, METRICS_FILE, RECIPE_FILE, SUMMARY_FILE

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


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
        self.root: str = root.rstrip("/")

    def push(self, path: Path, run_dir: Path, keep: int) -> None:
        """Copy a checkpoint and the metrics so far; then drop all but the newest `keep`."""
        target = f"{self.root}/{CHECKPOINTS}/{path.name}"
        if self._fs.exists(target):
            self._fs.rm(target, recursive=True)
        files = sorted(
            path.iterdir(), key=lambda file: file.name == checkpoint.STATE
        )  # the list of the others last
        for file in files:
            self._put(file, f"{target}/{file.name}")
        self._put(run_dir / METRICS_FILE, f"{self.root}/{METRICS_FILE}")
        for old in self._names()[:-keep]:
            self._fs.rm(f"{self.root}/{CHECKPOINTS}/{old}", recursive=True)

    def push_final(self, run_dir: Path) -> None:
        """Copy what a finished run leaves, and drop the checkpoints that only resuming needed."""
        for file in sorted((run_dir / FINAL).rglob("*"), key=lambda file: file.name == "config.json"):
            if file.is_file():
                self._put(file, f"{self.root}/{file.relative_to(run_dir).as_posix()}")
        for name in (METRICS_FILE, RECIPE_FILE, SUMMARY_FILE):
            self._put(run_dir / name, f"{self.root}/{name}")
        if self._fs.exists(f"{self.root}/{CHECKPOINTS}"):
            self._fs.rm(f"{self.root}/{CHECKPOINTS}", recursive=True)

    def pull(self, run_dir: Path) -> None:
        """Bring the newest whole checkpoint and its metrics, unless the run's folder has one as new.

        A torn or damaged one is passed over with a warning.
        """
        here = checkpoint.newest(run_dir / CHECKPOINTS)
        for name in reversed(self._names()):
            if here is not None and here.name >= name:
                return
            temporary = run_dir / CHECKPOINTS / f".fetching-{os.getpid()}"
            shutil.rmtree(temporary, ignore_errors=True)
            fetched = temporary / name
            fetched.mkdir(parents=True)
            for file in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE):
                source = f"{self.root}/{CHECKPOINTS}/{name}/{file}"
                if self._fs.exists(source):
                    self._fs.get_file(source, str(fetched / file))
            whole = checkpoint.newest(temporary) is not None
            if whole:
                shutil.rmtree(run_dir / CHECKPOINTS / name, ignore_errors=True)
                os.replace(fetched, run_dir / CHECKPOINTS / name)
                self._fs.get_file(f"{self.root}/{METRICS_FILE}", str(run_dir / METRICS_FILE))
                logger.info("fetched %s from %s", name, self.root)
            shutil.rmtree(temporary)
            if whole:
                return

    def _names(self) -> list[str]:
        """Checkpoints there, oldest first, whole or not."""
        folder = f"{self.root}/{CHECKPOINTS}"
        self._fs.invalidate_cache()  # another process may have written since
        if not self._fs.exists(folder):
            return []
        return sorted(
            str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(folder, detail=False)
        )

    def _put(self, file: Path, target: str) -> None:
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._fs.put_file(str(file), target)
