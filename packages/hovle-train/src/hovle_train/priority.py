"""Whose turn it is on this machine's cores: what of Ray only looks on waits for what trains.

A step that computes on all cores waits for the one that was interrupted last, and Ray's processes keep waking up while
they have nothing to do (benchmarks/train_loop.py).
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

# By a part of their command: what looks on, and actors of Ray Train that a step never waits for. Left alone are GCS,
# raylet, TrainController and whatever else may be given something to compute, or somebody waits for.
_ONLOOKERS = (
    "/ray/autoscaler/_private/monitor.py",
    "/ray/dashboard/dashboard.py",
    "/ray/_private/log_monitor.py",
    "ray::DashboardAgent",
    "ray::_AutoscalingCoordinatorActor",
    "ray::PlacementGroupCleaner",
    "ray::SynchronizationActor",
    "ray::DatasetManager",
)


def own_ray() -> list[int]:
    """Process ids of a Ray that this process started on this machine; none where it joined a cluster."""
    import ray

    found, home = [], str(Path(ray.__file__).parent)
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it ended meanwhile
            if any(argument.startswith(home) for argument in child.cmdline()):
                found.append(child.pid)
    return found


def have_ray_wait(own: Sequence[int]) -> None:
    """Called by a worker: have Ray's onlookers run when nothing else wants their core, if the Ray is our own.

    own: `own_ray()` of the process that started it. Linux alone knows such a policy (SCHED_IDLE), for which no rights
    are needed; elsewhere this does nothing.
    """
    raylet = os.getppid()
    if raylet not in own or not hasattr(os, "SCHED_IDLE"):
        return
    with suppress(psutil.Error):  # the raylet ends: so does this worker
        own = [*own, *(child.pid for child in psutil.Process(raylet).children())]
    for pid in own:
        # Processes end meanwhile; and where a sandbox forbids it, a step is only slower.
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            command = " ".join(process.cmdline())
            if any(onlooker in command for onlooker in _ONLOOKERS):
                for thread in process.threads():
                    os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))
