"""Watching a run from outside: a bar that follows the run's own files, wherever its workers are."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hovle_train.metrics import read_metrics
from hovle_train.runs import METRICS_FILE, STATUS_FILE

POLL_S = 0.5


@contextmanager
def follow(run_dir: Path, label: str, steps: int, console: Console | None = None) -> Iterator[None]:
    """Show a bar for the run in `run_dir` while the body runs; on a dumb terminal, a line now and then."""
    console = console or Console(stderr=True)
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(run_dir, label, steps, console, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(run_dir: Path, label: str, steps: int, console: Console, stop: threading.Event) -> None:
    if not console.is_terminal:
        _watch_lines(run_dir, label, steps, console, stop)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=steps, note="starting workers")
        while True:
            done, note = status(run_dir)
            bar.update(task, completed=done, note=note)
            if stop.wait(POLL_S):
                break
        done, note = status(run_dir)
        bar.update(task, completed=done, note=note)


def _watch_lines(run_dir: Path, label: str, steps: int, console: Console, stop: threading.Event) -> None:
    next_line = time.monotonic()
    while not stop.wait(POLL_S):
        if time.monotonic() >= next_line:
            done, note = status(run_dir)
            console.print(f"{label}: step {done} of {steps}  {note}", highlight=False)
            next_line = time.monotonic() + 20


def status(run_dir: Path) -> tuple[int, str]:
    """(steps done, a few words on how it goes) of a run, from its files."""
    records = read_metrics(run_dir / METRICS_FILE)
    if records:
        return records[-1]["step"] + 1, describe(records[-1])
    text = run_dir / STATUS_FILE
    return 0, text.read_text() if text.is_file() else "starting workers"


def describe(metrics: Mapping[str, Any]) -> str:
    """A logged step in words: how well it learns, how fast, and where time is lost."""
    words = [
        f"{name} {metrics[name]:.3f}" for name in ("loss", "image_cosine", "text_cosine") if metrics.get(name)
    ]
    words.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    shares = {"mfu": "MFU", "data_wait_share": "data wait", "fill": "fill"}
    words += [f"{said} {metrics[name]:.0%}" for name, said in shares.items() if metrics.get(name) is not None]
    if (imbalance := metrics.get("imbalance")) and imbalance > 1.005:  # of several ranks
        words.append(f"imbalance {imbalance:.2f}")
    return "  ".join(words)
