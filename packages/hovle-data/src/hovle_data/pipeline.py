"""The batches of optimizer step s, for any rank of any world size, prepared in the background or when asked for."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from hovle_data.packing import PackedBatch, pack

if TYPE_CHECKING:
    from hovle_core.processor import Encoded

logger = logging.getLogger(__name__)


class SampleStream(Protocol):
    """What loaders read: the sample at a global position, None where it is quarantined."""

    def get(self, k: int, /) -> Encoded | None: ...


State = dict[str, list[int]]
"""What a checkpoint keeps of a loader: JSON, and empty where the step says it all."""

Read = Callable[[Iterable[int]], Iterable["Encoded | None"]]
_Item = tuple[int, list[PackedBatch], State]
_Produce = Callable[[threading.Event], Generator[_Item]]


class _Closing(ABC):
    """Closed where its `with` block ends."""

    @abstractmethod
    def close(self) -> None:
        """Stop reading; nothing comes after it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Loader(_Closing):
    """Packed batches step by step for rank `rank` of `world_size`; `steps` says which samples a step has.

    max_tokens, max_tiles: budgets of one packed batch.
    num_threads: that run `stream.get` at a time; results keep the order of the positions, so their number
        changes nothing.
    prefetch: steps prepared ahead of the consumer, by a thread; with 0 a step is prepared when it is asked for. The
        thread computes in NumPy and Pillow, not in torch, whose parallel operations would have OpenMP's threads sleep
        beside it (`hovle_core.openmp`). Only `image.fast` resizes in torch: on a CPU it suits 0.
    """

    def __init__(
        self,
        stream: SampleStream,
        max_tokens: int,
        max_tiles: int,
        rank: int,
        world_size: int,
        num_threads: int,
        prefetch: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is outside 0..world_size-1={world_size - 1}")
        if num_threads < 1 or prefetch < 0:
            raise ValueError(
                f"num_threads={num_threads} must be at least 1, and prefetch={prefetch} at least 0"
            )
        self.stream = stream
        self.max_tokens = max_tokens
        self.max_tiles = max_tiles
        self.rank = rank
        self.world_size = world_size
        self.num_threads = num_threads
        self.prefetch = prefetch
        self._running: weakref.WeakSet[Steps] = weakref.WeakSet()

    @abstractmethod
    def steps(self, start_step: int, state: State, read: Read) -> Iterator[tuple[list[PackedBatch], State]]:
        """This rank's batches of start_step, start_step + 1, ... for ever, each with the state to go on behind it.

        state: of all ranks together, as a checkpoint of step start_step - 1 has it; empty at step 0.
        read: `stream.get` of many positions, in their order.
        """

    def iterate(self, start_step: int = 0, stop_step: int | None = None, state: State | None = None) -> Steps:
        """Iterate over (step, batches, data_wait_s) from start_step to stop_step - 1 (None: for ever).

        A thread prepares the steps ahead, with `prefetch` 0 none; data_wait_s is how long the consumer stood waiting
        for one. An error is raised here, at the step it belongs to. The thread ends with the last step,
        with `close()` (also on leaving a `with` block, here or of the loader) and when the iterator is
        dropped.
        """
        produce = partial(self._produce, start_step, stop_step, state or {})
        iterator: Steps = StepIterator(produce, self.prefetch) if self.prefetch else InlineSteps(produce)
        self._running.add(iterator)
        return iterator

    def close(self) -> None:
        """Stop the threads of all iterators that are still running."""
        for iterator in list(self._running):
            iterator.close()

    def _produce(
        self, start_step: int, stop_step: int | None, state: State, stopped: threading.Event
    ) -> Generator[_Item]:
        """The steps one by one; a producer thread's own loop."""
        threads = ThreadPoolExecutor(self.num_threads, "hovle-data") if self.num_threads > 1 else None

        def get(k: int) -> Encoded | None:
            if stopped.is_set():  # closing does not wait for a whole step; nobody sees this error
                raise _Closed
            return self.stream.get(k)

        def read(positions: Iterable[int]) -> Iterable[Encoded | None]:
            return threads.map(get, positions) if threads else map(get, positions)

        try:
            prepared = self.steps(start_step, state, read)
            for step in count(start_step) if stop_step is None else range(start_step, stop_step):
                yield step, *next(prepared)
        finally:
            if threads:
                threads.shutdown(cancel_futures=True)


class _Closed(Exception):
    """The consumer is gone."""


class StepLoader(Loader):
    """Global step s consumes the sample positions s*G ... (s+1)*G - 1 of a stream, G being `global_batch_size`.

    Rank r of W takes the positions s*G + r, s*G + r + W, ... of them, so all ranks together see the same
    samples for every W, and resuming is starting at another step: nothing is left in a buffer behind a step,
    so there is no state to save. Quarantined samples are left out; a rank may so have fewer samples than
    another, or none (an empty list), and the loss divides by the global target count. A step packs into as many
    batches as it takes.
    """

    def __init__(
        self,
        stream: SampleStream,
        global_batch_size: int,
        max_tokens: int,
        max_tiles: int,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 1,
        prefetch: int = 2,
    ) -> None:
        super().__init__(stream, max_tokens, max_tiles, rank, world_size, num_threads, prefetch)
        if global_batch_size < world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} < world_size={world_size}: give each rank a sample a step"
            )
        self.global_batch_size = global_batch_size

    def positions(self, step: int) -> range:
        """The sample positions of this rank in a step."""
        if step < 0:
            raise ValueError(f"step={step} is negative")
        start = step * self.global_batch_size
        return range(start + self.rank, start + self.global_batch_size, self.world_size)

    def batches(self, step: int) -> list[PackedBatch]:
        """This rank's packed batches of a step, prepared here and now."""
        return self._pack(map(self.stream.get, self.positions(step)))

    def steps(self, start_step: int, state: State, read: Read) -> Iterator[tuple[list[PackedBatch], State]]:
        for step in count(start_step):
            yield self._pack(read(self.positions(step))), {}

    def _pack(self, encoded: Iterable[Encoded | None]) -> list[PackedBatch]:
        return pack([sample for sample in encoded if sample is not None], self.max_tokens, self.max_tiles)


class Steps(_Closing):
    """Iterator over (step, batches, data_wait_s); see `Loader.iterate`.

    state: of this rank behind the step that came last, whatever is prepared ahead of it.
    """

    state: State

    def __iter__(self) -> Self:
        return self

    @abstractmethod
    def __next__(self) -> tuple[int, list[PackedBatch], float]: ...


class InlineSteps(Steps):
    """Each step is prepared when it is asked for, by who asks."""

    def __init__(self, produce: _Produce) -> None:
        self.state = {}
        self._items = produce(threading.Event())

    def __next__(self) -> tuple[int, list[PackedBatch], float]:
        start = time.perf_counter()
        step, batches, self.state = next(self._items)
        return step, batches, time.perf_counter() - start

    def close(self) -> None:
        self._items.close()


class StepIterator(Steps):
    """With a producer thread."""

    def __init__(self, produce: _Produce, prefetch: int) -> None:
        self.state = {}
        self._queue: queue.Queue[_Item | BaseException | None] = queue.Queue(maxsize=prefetch)
        self._stopped = threading.Event()
        # The thread knows the queue and the event, not this object: dropping the iterator is enough to end it.
        self._thread = threading.Thread(
            target=_run,
            args=(produce, self._queue, self._stopped),
            name="hovle-data-producer",
            daemon=True,
        )
        self._thread.start()

    def __next__(self) -> tuple[int, list[PackedBatch], float]:
        if self._stopped.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        data_wait_s = time.perf_counter() - start
        if item is None or isinstance(item, BaseException):
            self.close()
            if item is None:
                raise StopIteration
            raise item
        step, batches, self.state = item
        return step, batches, data_wait_s

    def close(self) -> None:
        """Stop the thread and wait until it has finished the sample it is at. Steps prepared ahead are dropped."""
        self._stopped.set()
        deadline = time.monotonic() + 10
        while self._thread.is_alive() and time.monotonic() < deadline:
            while (
                not self._queue.empty()
            ):  # a producer that waits for room must get it to see that it is over
                self._queue.get_nowait()
            self._thread.join(0.01)
        if self._thread.is_alive():
            logger.warning(
                "the data thread still reads after 10 s; it ends with its sample or with the process"
            )

    def __del__(self) -> None:
        self._stopped.set()  # and the thread drops what it holds at its next put


def _run(
    produce: _Produce,
    items: queue.Queue[_Item | BaseException | None],
    stopped: threading.Event,
) -> None:
    last: BaseException | None = None
    try:
        for item in produce(stopped):
            if not _put(items, item, stopped):
                return
    except BaseException as error:  # whatever it is, the consumer must hear of it
        last = error
    _put(items, last, stopped)


def _put(
    items: queue.Queue[_Item | BaseException | None],
    item: _Item | BaseException | None,
    stopped: threading.Event,
) -> bool:
    """Put unless the consumer is gone; False if it is."""
    while not stopped.is_set():
        try:
            items.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
