"""What the demo costs: seconds of its phases over all starts, memory of all its processes, and the machine."""

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from hovle_core.precision import has_fast_bfloat16
from hovle_train.export import write_json


class Clock:
    """Seconds of each phase, what a virtual machine's host took of them, and the peak of memory, over all starts of the
    demo: a resumed one must not look fast."""

    IDLE_S = 3.0

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = {"seconds": {}, "stolen_s": 0.0, "peak_gib": 0.0}
        if path.is_file():
            self.content |= json.loads(path.read_text())

    @property
    def seconds(self) -> dict[str, float]:
        return self.content["seconds"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body, also where it fails; what is done over again counts again.

        Finding out that there is nothing to do (below `IDLE_S`) is not counted, unless nothing was before.
        """
        started, stolen = time.perf_counter(), _stolen_s()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            if spent > self.IDLE_S or name not in self.seconds:
                self.seconds[name] = self.seconds.get(name, 0.0) + spent
                self.content["stolen_s"] += (_stolen_s() - stolen) / (os.cpu_count() or 1)
                write_json(self.path, self.content)

    @property
    def steal_share(self) -> float:
        """How much of the phases' time the host gave to others (Linux's steal), of all cores together; 0 on iron."""
        return float(self.content["stolen_s"]) / max(1e-9, sum(self.seconds.values()))

    def peak(self, gib: float) -> float:
        """The larger of `gib` and what was seen before."""
        self.content["peak_gib"] = max(self.content["peak_gib"], gib)
        write_json(self.path, self.content)
        return self.content["peak_gib"]


def _stolen_s() -> float:
    """CPU seconds that the host has taken since this machine started, of all cores; 0 where nobody says."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


class Memory:
    """The most memory that this process and all it started held together (PSS: shared pages count once)."""

    INTERVAL_S = 10.0  # reading PSS walks the page tables of processes that are computing

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self.INTERVAL_S):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    info = process.memory_full_info()
                except psutil.Error:
                    continue  # gone since it was listed
                total += getattr(info, "pss", info.rss)
            self.peak_gib = max(self.peak_gib, total / 2**30)


def machine() -> str:
    """Cores, processor, whether bfloat16 is fast, and memory, in a line."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    fast = "AMX" if has_fast_bfloat16(torch.device("cpu")) else "no AMX"
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} x {names[0] if names else platform.processor()} ({fast}), {memory:.0f} GiB"
