"""Workers of unequal speed in one group: of a step's samples each takes so many as it is fast.

A step's samples stay the same, and losses are divided by the targets of all ranks, so the gradient does not know who
computed what.
"""

from collections.abc import Sequence
from typing import Any

from hovle_data.pipeline import StepLoader
from hovle_train.runtime import Runtime

# Steps between two measurements: long enough to average over samples of all lengths.
EVERY = 8
# Share of the newest measurement in a rank's speed: a moment's noise should not move half the batch.
NEWEST = 0.5


def split(total: int, speeds: Sequence[float]) -> list[int]:
    """Shares of `total` in proportion to speeds, at least 1 each: whole numbers by largest remainder."""
    spare = total - len(speeds)
    wanted = [spare * speed / sum(speeds) for speed in speeds]
    counts = [int(share) for share in wanted]
    by_remainder = sorted(range(len(speeds)), key=lambda r: (counts[r] - wanted[r], r))
    for rank in by_remainder[: spare - sum(counts)]:
        counts[rank] += 1
    return [count + 1 for count in counts]


class Balance:
    """How many of a step's `global_batch_size` samples each rank takes; the same on all ranks.

    ahead: steps that a loader may have prepared already when a measurement comes in, which keep their shares.
    """

    def __init__(self, runtime: Runtime, global_batch_size: int, ahead: int):
        self.runtime, self.global_batch_size, self.ahead = runtime, global_batch_size, ahead
        self._speeds: list[float] | None = None
        self._tokens, self._seconds = 0, 0.0
        even = split(global_batch_size, [1.0] * runtime.world_size)
        self._plan = [(0, even)]  # from which step on, shares; read by the loader's thread

    def counts(self, step: int) -> list[int]:
        """Samples of each rank in a step."""
        return next(counts for start, counts in reversed(self._plan) if start <= step)

    def add(self, step: int, tokens: int, seconds: float) -> None:
        """Count this rank's own work in a step, without its wait for others; all ranks call it step by step."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        if (step + 1) % EVERY:
            return
        measured = self.runtime.gather(self._tokens / max(self._seconds, 1e-9))
        self._tokens, self._seconds = 0, 0.0
        before = self._speeds or measured
        # A rank whose samples were all bad has nothing to show for its time: it keeps its speed.
        pairs = zip(before, [new or old for new, old in zip(measured, before, strict=True)], strict=True)
        self._speeds = [(1 - NEWEST) * old + NEWEST * new for old, new in pairs]
        if all(self._speeds):
            self._plan.append((step + 1 + self.ahead, split(self.global_batch_size, self._speeds)))

    def metrics(self, step: int) -> dict[str, float]:
        counts = self.counts(step)
        return {
            "smallest_share": min(counts) / self.global_batch_size,
            "largest_share": max(counts) / self.global_batch_size,
        }


class BalancedLoader(StepLoader):
    """StepLoader whose ranks take neighbouring positions, as many as `balance` says."""

    def __init__(self, balance: Balance, **options: Any):
        super().__init__(**options)
        self.balance = balance

    def positions(self, step: int) -> range:
        counts = self.balance.counts(step)
        start = step * self.global_batch_size + sum(counts[: self.rank])
        return range(start, start + counts[self.rank])
