"""Steps of so many full rows instead of so many samples: even work for every rank, whatever the samples' sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hovle_data.packing import PackedBatch, best_fit, join
from hovle_data.pipeline import Loader, Read, SampleStream, State

if TYPE_CHECKING:
    from hovle_core.processor import Encoded

READ_SIZE = 8  # positions read at a time; fixed, so that the number of threads changes no row
MAX_EMPTY_READS = 128  # reads in a row without a usable sample, after which waiting for one is hopeless


class RowLoader(Loader):
    """Global step s is `global_batch_rows` packed rows, one from each lane.

    Lane v of V takes the positions v, v + V, v + 2V, ... of the stream and packs them for itself; rank r of W
    owns the lanes r, r + W, .... So a step's rows depend on V but not on W: 1, 2 or 4 ranks train on the same
    samples, step by step, also when their number changes at a restart. What waits in a lane's window is part
    of `state`, as positions.

    window: how many rows' worth of samples (tokens or tiles, whichever comes first) a lane holds to choose
        from; with two reads of READ_SIZE samples, the second by threads ahead of its use, the bound on its memory.
    """

    def __init__(
        self,
        stream: SampleStream,
        global_batch_rows: int,
        max_tokens: int,
        max_tiles: int,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 1,
        prefetch: int = 2,
        window: int = 4,
    ) -> None:
        super().__init__(stream, max_tokens, max_tiles, rank, world_size, num_threads, prefetch)
        if global_batch_rows < 1 or global_batch_rows % world_size:
            raise ValueError(
                f"global_batch_rows={global_batch_rows} does not divide by world_size={world_size}: give a multiple "
                "of every number of workers the run may have"
            )
        if window < 1:
            raise ValueError(f"window={window}: give at least 1, a row's worth of samples")
        self.global_batch_rows = global_batch_rows
        self.window = window

    def steps(self, start_step: int, state: State, read: Read) -> Iterator[tuple[list[PackedBatch], State]]:
        numbers = range(self.rank, self.global_batch_rows, self.world_size)
        names = {str(v) for v in range(self.global_batch_rows)}
        if state.keys() != names and (state or start_step):
            raise ValueError(
                f"step {start_step} needs the state of lanes 0..{self.global_batch_rows - 1} behind the step before "
                f"it, and the checkpoint has {sorted(state)}; restore its global_batch_rows, or start afresh"
            )
        lanes = [Lane(v, self, state.get(str(v), [0])) for v in numbers]
        for lane in lanes:
            lane.restore(read)
        while True:
            rows = [lane.row(read) for lane in lanes]
            yield rows, {str(lane.number): lane.state for lane in lanes}


class Lane:
    """The packed rows of positions `number`, `number` + V, ...: each has the longest-waiting sample and what best
    fits beside it, so no sample waits for more rows than there are samples before it.

    state: [n, p, q, ...]: n positions of the lane are read, and those at p, q, ... wait for a row.
    """

    def __init__(self, number: int, loader: RowLoader, state: list[int]) -> None:
        self.number = number
        self.loader = loader
        self.num_read, *self._to_restore = state
        self._waiting: dict[int, Encoded] = {}  # position -> sample, oldest first
        self._coming: tuple[range, Iterable[Encoded | None]] | None = None

    @property
    def state(self) -> list[int]:
        return [self.num_read, *self._waiting]

    def restore(self, read: Read) -> None:
        """Read again what waited when the state was saved."""
        self._keep(self._to_restore, read(self._to_restore))

    def row(self, read: Read) -> PackedBatch:
        """The next row. Raises ValueError if no sample of a long stretch is usable."""
        self._fill(read)
        positions = list(self._waiting)
        chosen = best_fit(
            [self._waiting[k] for k in positions], self.loader.max_tokens, self.loader.max_tiles
        )
        return join([self._waiting.pop(positions[i]) for i in chosen])

    def _fill(self, read: Read) -> None:
        loader, empty_reads = self.loader, 0
        while self._tokens() < loader.window * loader.max_tokens and (
            self._tiles() < loader.window * loader.max_tiles
        ):
            positions, samples = self._coming or self._begin(read)
            self.num_read += READ_SIZE
            self._coming = self._begin(read)  # threads go on with these while rows are joined and trained on
            empty_reads = 0 if self._keep(positions, samples) else empty_reads + 1
            if empty_reads == MAX_EMPTY_READS:
                raise ValueError(
                    f"{MAX_EMPTY_READS * READ_SIZE} samples in a row are bad, up to position {positions.stop}: the "
                    "quarantine ledger names them"
                )

    def _begin(self, read: Read) -> tuple[range, Iterable[Encoded | None]]:
        """The next positions to read, and their samples as they come."""
        stride = self.loader.global_batch_rows
        first = self.number + self.num_read * stride
        positions = range(first, first + READ_SIZE * stride, stride)
        return positions, read(positions)

    def _keep(self, positions: Sequence[int], samples: Iterable[Encoded | None]) -> bool:
        found = {k: sample for k, sample in zip(positions, samples, strict=True) if sample is not None}
        self._waiting |= found
        return bool(found)

    def _tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self._waiting.values())

    def _tiles(self) -> int:
        return sum(len(sample.tiles) for sample in self._waiting.values())
