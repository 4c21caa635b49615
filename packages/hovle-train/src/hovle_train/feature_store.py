"""Teacher features while they are computed: what a start that ended had done, the next one goes on behind.

P image tokens a tile, C teacher channels.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

FEATURES, INDEX = "features.float16", "index.json"
# What a kill or a power cut loses at most of a teacher's work, beside the batch under way.
SYNC_SECONDS = 10.0


class GrowingStore:
    """Rows of float16 `[P, C]` in `features.tmp`, and in `rows.tmp` a line for those that are on the disk for sure.

    position: what of the data is done, in whatever its reader counts. total: sum of all rows and tokens `[C]`, in
    float64, added up in the order of the rows, so that it does not tell how often this was broken off.
    Within: what was done is kept at the end, too, but where the disk failed.
    """

    def __init__(self, folder: Path, row: tuple[int, int], made_by: Any):
        self.features, self._lines = folder / "features.tmp", folder / "rows.tmp"
        self._row = row
        self.keys: list[str] = []
        # Position, rows and total, replaced at once: of what is interrupted in the middle nothing is kept.
        self._done = (0, 0, torch.zeros(row[1], dtype=torch.float64))
        head = json.loads(json.dumps({"made_by": made_by, "row": row}))
        finished = folder / FEATURES
        if not self.features.exists() and finished.exists() and not (folder / INDEX).exists():
            os.replace(finished, self.features)  # its index was not written any more
        if not self._continue(head):
            self._lines.write_text(json.dumps(head) + "\n")
            self.features.write_bytes(b"")
        self._file = self.features.open("ab")
        self._synced, self._known = time.monotonic(), len(self.keys)

    @property
    def position(self) -> int:
        return self._done[0]

    @property
    def total(self) -> Tensor:
        return self._done[2]

    def add(self, position: int, keys: list[str], features: Tensor) -> None:
        """Rows `[N, P, C]` behind those before; `position` is where to go on behind them."""
        total = self.total + features.double().sum((0, 1))
        self._file.write(features.half().numpy().tobytes())
        self.keys += keys
        self._done = (position, len(self.keys), total)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._file:
            if kind is None or not issubclass(kind, OSError):
                self._sync()

    def remove_lines(self) -> None:
        self._lines.unlink()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        position, count, total = self._done
        line = {"position": position, "keys": self.keys[self._known : count], "total": total.tolist()}
        with self._lines.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            self._known = count
            os.fsync(lines.fileno())
        self._synced = time.monotonic()

    def _continue(self, head: Any) -> bool:
        """Take up what is there, if it is of the same teacher and data; a line that was cut short does not count."""
        try:
            whole = self._lines.read_bytes()
            found = [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
            size = self.features.stat().st_size
        except (OSError, ValueError):
            return False
        if not found or found[0] != head:
            return False
        keys = [key for line in found[1:] for key in line["keys"]]
        bytes_ = len(keys) * int(np.prod(self._row)) * 2
        if size < bytes_:
            return False
        if len(found) > 1:
            total = torch.tensor(found[-1]["total"], dtype=torch.float64)
            self.keys, self._done = keys, (found[-1]["position"], len(keys), total)
        os.truncate(self._lines, whole.rfind(b"\n") + 1)
        os.truncate(self.features, bytes_)
        return True
