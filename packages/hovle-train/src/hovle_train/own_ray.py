"""A Ray that `hovle train` started for itself, on this machine alone: how to have it leave the cores to what trains.

A step that computes on all cores waits for the one that was interrupted last, and Ray's processes wake up many times a
second while they have nothing to do (benchmarks/train_loop.py). The processes of a cluster are left alone.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

# By the end of their script's path: the autoscaler of a cluster that cannot grow, what shows workers' prints to a
# driver that wants none, and the head of a dashboard that was not asked for.
_ONLOOKERS = (
    "autoscaler/_private/monitor.py",
    "_private/log_monitor.py",
    "dashboard/dashboard.py",
)
# What has Ray Train start an actor each: one would free the workers' room if their controller died alone (ours ends
# with the command, and all of this Ray with it; it asks that dashboard once a second), one deals Ray's data sets out.
_CALLBACKS = ("PlacementGroupCleanerCallback", "DatasetsCallback")
# By a part of their title: actors and an agent that a worker alone never waits for but where it has ended. GCS and
# raylet may be asked for something by what trains.
_PATIENT = (
    "ray::TrainController",
    "ray::_AutoscalingCoordinatorActor",
    "ray::SynchronizationActor",
    "ray::DashboardAgent",
)

_EXIT_SECONDS = 5.0  # what Ray's processes have to end by themselves


def own_ray() -> list[int]:
    """Process ids of a Ray that this process started on this machine; none where it joined a cluster."""
    return [child.pid for child, _ in _own_ray()]


def end_onlookers() -> None:
    """End what only looks on in the Ray that this process started. `ray status` and `ray list` do not see it then."""
    for child, arguments in _own_ray():
        if any(argument.endswith(_ONLOOKERS) for argument in arguments):
            with suppress(psutil.NoSuchProcess):
                child.kill()


def shut_down() -> None:
    """End the Ray that this process started, and what of it would stay.

    A worker that exits just when its raylet does can wait for a lock of its own for ever (Ray 2.60: the destructor of
    CoreWorkerProcessImpl posts to a scheduler that shuts down), and hold what memory it has.
    """
    import ray

    processes = [child for child, _ in _own_ray()]
    for child in tuple(processes):
        with suppress(psutil.NoSuchProcess):
            processes += child.children(recursive=True)
    ray.shutdown()
    for process in psutil.wait_procs(processes, timeout=_EXIT_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def without_onlookers(trainer: type[Any]) -> type[Any]:
    """The class of Ray's trainer without two actors that this Ray's runs do not need.

    Ray has no setting for them. A release that makes its callbacks elsewhere has them all, and steps that much slower.
    """

    class Trainer(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            every = super()._create_default_callbacks()
            return [callback for callback in every if type(callback).__name__ not in _CALLBACKS]

    return Trainer


def have_ray_wait(own: Sequence[int]) -> None:
    """Called by a worker: have what looks after it run when nothing else wants its core, if the Ray is our own.

    own: `own_ray()` of the process that started it. Linux alone knows such a policy (SCHED_IDLE), for which no rights
    are needed; elsewhere this does nothing.
    """
    raylet = os.getppid()
    if raylet not in own or not hasattr(os, "SCHED_IDLE"):
        return
    with suppress(psutil.NoSuchProcess):  # the raylet ends: so does this worker
        for process in psutil.Process(raylet).children():
            # Processes end meanwhile; and where a sandbox forbids it, a step is only slower.
            with suppress(psutil.Error, OSError):
                if any(title in " ".join(process.cmdline()) for title in _PATIENT):
                    for thread in process.threads():
                        os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))


def _own_ray() -> Iterator[tuple[psutil.Process, list[str]]]:
    import ray

    home = f"{Path(ray.__file__).parent}{os.sep}"
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it ended meanwhile
            arguments = child.cmdline()
            if any(argument.startswith(home) for argument in arguments):
                yield child, arguments
