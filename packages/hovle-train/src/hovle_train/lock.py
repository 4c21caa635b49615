"""One process of a kind trains in a run's folder, and others can see that it does."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK_FILE, LOCK_SECONDS = ".lock", 60.0


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Within: no other process of this kind trains in `run_dir`, which the operating system sees to: a lock ends with
    its process. Waits for a worker that is about to end, since its `hovle train` was killed.

    Raises ValueError for one that goes on. A file system without locks is taken as it is, and so is Windows.
    """
    if sys.platform == "win32":
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    path, deadline = run_dir / LOCK_FILE, time.monotonic() + LOCK_SECONDS
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if time.monotonic() > deadline:
                raise ValueError(
                    f"another process trains in {run_dir}: wait for it, or choose another run_dir"
                ) from None
            time.sleep(0.5)
            continue
        except OSError:  # ENOTSUP, ENOLCK: some network file systems
            break
        if _is_at(path, file.fileno()):
            break
        file.close()  # whoever had it removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_running(run_dir: Path) -> bool:
    """Whether a process trains in `run_dir` now, as far as its file system has locks that this machine sees."""
    if sys.platform == "win32":
        return False
    try:
        with (run_dir / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or this file system has none
        return False
    return False
