"""What a run tells of itself: one JSON line a logged step, always; observers get the same through a hook."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def truncate_metrics(path: Path, step: int) -> None:
    """Drop lines after `step`: a resumed run writes them again."""
    if not path.exists():
        return
    kept = [line + b"\n" for line, record in _whole_lines(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, in order."""
    return [record for _, record in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines and what they say, but for the last one of a killed run or of one that writes now, and damaged ones."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


class MetricsWriter:
    """Appends to `metrics.jsonl`, a flushed line at a time."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
