"""What the loop tells of its steps: sums since the last line, over all ranks, in `metrics.jsonl` and to observers."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hovle_data.packing import PackedBatch
from hovle_data.quarantine import Ledger
from hovle_train.balance import Balance
from hovle_train.config import Recipe
from hovle_train.fill import Fill
from hovle_train.metrics import MetricsWriter
from hovle_train.observers import Observers
from hovle_train.runs import METRICS_FILE
from hovle_train.runtime import Runtime
from hovle_train.speed import Speed


class StepLog:
    """All ranks add every step and write together; rank 0 has the file and the observers."""

    def __init__(self, recipe: Recipe, runtime: Runtime, observers: Observers, ledger: Ledger, speed: Speed):
        self.train, self.runtime, self.observers = recipe.train, runtime, observers
        self.ledger, self.speed = ledger, speed
        self.fill = Fill(recipe.train, runtime)
        self._writer = MetricsWriter(recipe.path / METRICS_FILE) if runtime.is_main else None
        self._begin()

    def add(
        self, micro_batches: Sequence[PackedBatch], data_wait_s: float, learned: Mapping[str, float]
    ) -> None:
        """Count one step of this rank.

        data_wait_s: seconds that it stood waiting for its samples. learned: losses and gradient norm, reduced over
        ranks already.
        """
        self.fill.add(micro_batches)
        self._steps += 1
        counts = {
            "tokens": sum(batch.num_tokens for batch in micro_batches),
            "samples": sum(len(batch.keys) for batch in micro_batches),
            "waited": data_wait_s,
        }
        for sums, values in ((self._learned, learned), (self._counted, counts)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value

    def write(self, step: int, lr: float, balance: Balance | None) -> None:
        """A line of means and rates behind every `log_every`-th step and the last one; nothing behind others.

        lr: of the first group of parameters. Raises PoorFill, on all ranks, for rows emptier than `train.min_fill`.
        """
        if (step + 1) % self.train.log_every and step + 1 != self.train.steps:
            return
        seconds, world_size = time.perf_counter() - self._began, self.runtime.world_size
        quarantine = {"bad": self.ledger.num_bad, "truncated": self.ledger.num_truncated}
        counted = self.runtime.sum(self._counted | quarantine)
        metrics: dict[str, Any] = {name: value / self._steps for name, value in self._learned.items()}
        metrics |= self.fill.measure() | (balance.metrics(step) if balance is not None else {})
        metrics |= {
            "lr": lr,
            "tokens_per_s": counted["tokens"] / seconds,
            "samples_per_s": counted["samples"] / seconds,
            "data_wait_share": counted["waited"] / world_size / seconds,
            "quarantined": int(counted["bad"]),
            "truncated": int(counted["truncated"]),
        }
        if self._writer is not None:
            metrics |= self.speed.mfu(metrics["tokens_per_s"], world_size)
            self._writer.write(step, metrics)
            self.observers.on_log(step, metrics)
        self._begin()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _begin(self) -> None:
        self._learned: dict[str, float] = {}
        self._counted: dict[str, float] = {}
        self._steps, self._began = 0, time.perf_counter()
