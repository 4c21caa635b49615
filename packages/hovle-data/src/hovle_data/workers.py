"""The same work in any number of processes, with a progress bar. Results come in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_state: list[Any] = []  # of a worker process: the function and what all tasks share


def work(
    function: Callable[[Any, Task], Result], shared: Any, tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """Yield `function(shared, task)` for each task, in order. One worker is this process itself.

    Both `function` and `shared` have to pickle. Workers are spawned, since forking a process with threads may
    hang, and die with this one. Raises what the function raises, and ValueError when a worker was killed.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: give at least 1")
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield function(shared, task)
        return
    try:
        state = pickle.dumps((function, shared))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"a source does not pickle ({error}); use --workers 1") from error
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start, (state,))
    try:
        yield from pool.map(_run, tasks)
    except BrokenProcessPool as error:
        raise ValueError("a worker was killed, perhaps for want of memory; start again to go on") from error
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress(
    results: Iterable[Result], label: str, total: int, size: Callable[[Result], int]
) -> Iterator[Result]:
    """Pass results on and show a bar on standard error; each counts for `size(result)` of `total`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        for result in results:
            bar.advance(task, size(result))
            yield result


def _start(state: bytes) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    _state[:] = pickle.loads(state)


def _die_with(parent: Any) -> None:
    parent.join()
    os._exit(1)  # nobody is left to take the results


def _run(task: Any) -> Any:
    function, shared = _state
    return function(shared, task)
