"""Whose turn it is on this machine's cores: Ray's own processes wait for those that train.

A step that computes on all cores waits for the one that was interrupted last, and Ray's processes, while they have
nothing to do, wake up hundreds of times a second: a tenth of a step on two cores (benchmarks/train_loop.py).
"""

import os
from collections.abc import Sequence
from contextlib import suppress

import psutil

# What computes, or may be given something to compute.
_COMPUTES = ("ray::RayTrainWorker", "ray::Teacher", "ray::IDLE")


def own_ray() -> list[int]:
    """Process ids of a Ray that this process started on this machine; none where it joined a cluster."""
    return [
        child.pid
        for child in psutil.Process().children()
        if any("/ray/" in argument for argument in child.cmdline())
    ]


def have_ray_wait(own: Sequence[int]) -> None:
    """Called by a worker: have Ray's processes run when nothing else wants their core, if the Ray is our own.

    own: `own_ray()` of the process that started it. What does training is left as it is, and so is what starts later.
    Linux alone knows such a policy (SCHED_IDLE), for which no rights are needed; elsewhere this does nothing.
    """
    raylet = os.getppid()
    if raylet not in own or not hasattr(os, "SCHED_IDLE"):
        return
    helpers = [child for child in psutil.Process(raylet).children() if child.pid != os.getpid()]
    for process in (*map(psutil.Process, own), *helpers):
        # Processes end meanwhile; and where a sandbox forbids it, a step is only slower.
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if " ".join(process.cmdline()).startswith(_COMPUTES):
                continue
            # What the raylet starts, the next worker too, is not to inherit it.
            policy = os.SCHED_IDLE | (os.SCHED_RESET_ON_FORK if process.pid == raylet else 0)
            for thread in process.threads():
                os.sched_setscheduler(thread.id, policy, os.sched_param(0))
