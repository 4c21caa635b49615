"""One writer of event files a run and process, in `RUN/tensorboard`."""

from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

FOLDER = "tensorboard"
FLUSH_SECONDS = (
    5  # a thread of the writer's brings points to the disk; its own flush() does not wait for the thread
)

_writers: dict[Path, SummaryWriter] = {}


def write(run_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Append one point to each curve; what is no number is left out.

    The first call of a process hides what an earlier, killed one wrote from `step` on: a resumed run repeats it.
    """
    if run_dir not in _writers:
        _writers[run_dir] = SummaryWriter(str(run_dir / FOLDER), purge_step=step, flush_secs=FLUSH_SECONDS)
    writer = _writers[run_dir]
    for name, value in metrics.items():
        if isinstance(value, int | float):
            writer.add_scalar(name, value, step)


def close(run_dir: Path) -> None:
    """Close the run's file, if this process has it open."""
    if writer := _writers.pop(run_dir, None):
        writer.close()
