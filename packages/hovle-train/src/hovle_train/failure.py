"""How a run ends early and what it leaves: asked to stop, hung, out of disk, or with numbers that are not finite.

Each end says what to do next, and none leaves half a file behind.
"""

import errno
import faulthandler
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from safetensors import SafetensorError

from hovle_train.lock import is_running
from hovle_train.runs import FAILED_FILE, RECIPE_FILE, is_finished, write_text
from hovle_train.runtime import Runtime

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again.
EXIT_STOPPED = 75
STOP_FILE = "stop"
AGAIN_SECONDS = 5.0  # some send a signal to a process and then to its group
STACKS = "hung"
NON_FINITE_FILE = "nonfinite.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(SystemExit):
    """The run was asked to stop (SIGTERM) and did, behind a checkpoint or before its first step; the process exits
    with EXIT_STOPPED."""

    def __init__(self, run_dir: Path):
        super().__init__(EXIT_STOPPED)
        self.run_dir = run_dir

    def __str__(self) -> str:
        return f"stopped as asked, in {self.run_dir}; the same command continues"


class NonFiniteError(FloatingPointError, ValueError):
    """A loss or gradient that is not finite; the weights are those before the step."""


class DiskFull(ValueError):
    """There was no room for a file; what was written before it is whole."""


@contextmanager
def ending_with_75() -> Iterator[None]:
    """Within: SIGTERM ends this process with EXIT_STOPPED where no run is under way that has to be stopped first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_STOPPED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_on_sigterm(run_dir: Path, asked: threading.Event, may_wait: bool = False) -> Iterator[None]:
    """Within: SIGTERM asks the run in `run_dir` to stop behind its next step, or before the first, and sets `asked`.

    The request is a file, since a run's folder is what all its workers share; one of an earlier start is dropped.
    may_wait: there may be no worker yet to read it; then Stopped is raised where SIGTERM finds this process, and a
    second SIGTERM, AGAIN_SECONDS later, raises it whatever workers do. Outside of the main thread Python takes no
    signals.
    """
    request, before_start = run_dir / STOP_FILE, _version(run_dir / RECIPE_FILE)
    first = [time.monotonic()]

    def ask(number: int, frame: FrameType | None) -> None:
        again = asked.is_set() and time.monotonic() - first[0] > AGAIN_SECONDS
        if not asked.is_set():
            first[0] = time.monotonic()
        request.touch()
        asked.set()
        # A worker writes the recipe down when it begins; its lock may be unseen here (network file systems).
        begun = is_running(run_dir) or _version(run_dir / RECIPE_FILE) != before_start
        if may_wait and (again or not begun) and not is_finished(run_dir):
            raise Stopped(run_dir)

    run_dir.mkdir(parents=True, exist_ok=True)
    request.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        request.unlink(missing_ok=True)


def _version(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None without one. Opened, since a network file system then looks anew."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def asked_to_stop(run_dir: Path) -> bool:
    return (run_dir / STOP_FILE).exists()


@contextmanager
def noting_failure(run_dir: Path) -> Iterator[None]:
    """Within a start of a run: what makes it fail is left in the run's folder (`note_failure`), for `hovle runs`.

    Not where another process trains there, and goes on: it is that one's folder.
    """
    others = is_running(run_dir)
    if not others:
        (run_dir / FAILED_FILE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if not (others and is_running(run_dir)):
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            note_failure(run_dir, f"{kind}{error}")
        raise


def note_failure(run_dir: Path, message: str) -> None:
    """Write down what ended a run, as far as its disk lets us: what is told to the user is the failure itself."""
    with suppress(OSError):
        write_text(run_dir / FAILED_FILE, message.encode("utf-8", "backslashreplace").decode())


@contextmanager
def clear_disk_errors(folder: Path) -> Iterator[None]:
    """Raise DiskFull, saying where and how much is free, for any error within that means there was no room."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error)  # safetensors says it in words
        if getattr(error, "errno", None) not in _NO_ROOM and not any(
            os.strerror(n) in text for n in _NO_ROOM
        ):
            raise
        free = shutil.disk_usage(folder).free
        raise DiskFull(
            f"no room for the run's files in {folder} ({text}; {free / 2**20:,.0f} MiB free): make room, or lower "
            "train.keep_checkpoints, and run the same command; it resumes from the newest whole checkpoint"
        ) from error


def check_finite(
    step: int,
    norm: float,
    sums: dict[str, float],
    own: dict[str, float],
    keys: list[str],
    where: tuple[Path, Runtime],
) -> None:
    """Raise NonFiniteError on all ranks if a loss or the gradient norm is not finite, before any update.

    sums, own: losses of all ranks and of this one; keys: this rank's samples. `nonfinite.json` in the run's folder
    then names every rank's losses and samples.
    """
    folder, runtime = where
    if all(abs(value) < float("inf") for value in (norm, *sums.values())):  # false for NaN, too
        return
    ranks = runtime.gather(
        {"rank": runtime.rank, "losses": {k: str(v) for k, v in own.items()}, "keys": keys}
    )
    if runtime.is_main:
        content = {"step": step, "gradient_norm": str(norm), "ranks": ranks}
        (folder / NON_FINITE_FILE).write_text(json.dumps(content, indent=1))
    raise NonFiniteError(
        f"step {step}: loss or gradient is not finite ({sums}, gradient norm {norm}); stopped before the update. "
        f"Samples of rank {runtime.rank}: {keys}; those of all ranks are in {folder / NON_FINITE_FILE}"
    )


class Watchdog:
    """Ends this process when no step has ended for `timeout` seconds; stacks of every rank are then in `folder`.

    The stacks are written by faulthandler's own thread, which needs no lock of Python's: also a rank that hangs in C
    leaves one. `timeout` has to cover the slowest step, with the wait for its data, and the writing of a checkpoint.
    """

    def __init__(self, folder: Path, runtime: Runtime, timeout: float):
        self.folder, self.runtime, self.timeout = folder, runtime, timeout
        self.grace = min(5.0, timeout)  # others' last step may have ended a little later
        self._ended = threading.Event()
        self._due = 0.0

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path(self.runtime.rank).open("w")
        self.beat()
        threading.Thread(target=self._watch, name="hovle-watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._path(self.runtime.rank).stat().st_size:
            self._path(self.runtime.rank).unlink()
            with suppress(OSError):  # another rank's file is still in it
                self.folder.rmdir()

    def beat(self) -> None:
        """A step has ended, or work that may take its time: the clock starts anew."""
        self._due = time.monotonic() + self.timeout + self.grace
        faulthandler.dump_traceback_later(self.timeout, file=self._file)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.txt"

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout / 4)):
            if time.monotonic() > self._due:
                message = self.message()
                self.runtime.give_up(message)
                print(f"hovle: error: {message}", file=sys.stderr, flush=True)
                os._exit(2)

    def message(self) -> str:
        """Which ranks hang and where, from the stacks of all of them."""
        found = []
        for rank in range(self.runtime.world_size):
            path = self._path(rank)
            stack = path.read_text() if path.exists() else ""
            place = place_of(stack)
            if not stack:
                found.append(f"rank {rank} does not answer")
            elif place is not None:
                found.append(f"rank {rank} is in {place}")
        where = "; ".join(found) or "all ranks wait for each other"
        return (
            f"no step ended within resources.step_timeout_s={self.timeout:g}: {where}. Stacks of all ranks are in "
            f"{self.folder}. If a step only takes that long, raise it"
        )


def place_of(stacks: str) -> str | None:
    """Where the thread that trains is, `file:line in function`, of faulthandler's text, or what reads for it if it
    waits for data; None if it waits for others."""
    threads = [re.findall(r'File "([^"]+)", line (\d+) in (\S+)', thread) for thread in stacks.split("\n\n")]
    trains = next((frames for frames in threads if _is_in(frames, "hovle_train/loop.py")), None)
    if trains is None or _is_in(trains, "torch/distributed/"):
        return None
    if _is_in(trains, "hovle_data/pipeline.py"):
        readers = [
            frames for frames in threads if frames is not trains and _is_in(frames, "hovle_data/")
        ]  # the producer, and the threads that it waits for if it has some
        busy = [frames for frames in readers if not _is_in(frames[:2], "concurrent/futures/")]
        trains = next(iter(busy or readers), trains)
    file, line, function = trains[0]
    return f"{file}:{line} in {function}"


def _is_in(frames: Sequence[tuple[str, str, str]], path: str) -> bool:
    return any(path in file for file, _, _ in frames)
