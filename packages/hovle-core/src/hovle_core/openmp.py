"""How idle OpenMP threads wait on CPUs; torch is not imported here, because libgomp reads it once, with torch."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

# For `GOMP_SPINCOUNT`, of a process alone on its cores: iterations that an idle thread waits awake, about 5 ms. That is
# longer than the gaps between a step's operations, whose wake-ups cost more than many an operation itself, and short
# beside what another process would have to wait.
SPINS = "100000"


def in_passing_thread(function: Callable[[], T]) -> T:
    """What `function` returns or raises, run in a thread that ends with it.

    libgomp keeps helper threads for every thread that ever computed in parallel, and once they are more than the cores
    together, all of them sleep at once whatever SPINS says. So what computes once, such as loading a model, does it in
    a thread that takes its helpers along, where another thread computes from then on.
    """
    found: Future[T] = Future()

    def work() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    # A daemon, and not joined where Ctrl-C interrupts the waiting: who ends the process does not wait for the work.
    thread = Thread(target=work, name="hovle-passing", daemon=True)
    thread.start()
    result = found.result()
    thread.join()  # its helpers end with it
    return result
