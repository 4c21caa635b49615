"""The one loop. It knows steps, batches, gradients and checkpoints, and of a stage only its interface.

Everything random in step s is drawn from (seed, s, rank), data order is a function of the position and learning
rates of the step; so a run that was killed continues with the very numbers of one that was not.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import nn

from hovle_core.plugins import HovlePlugins
from hovle_core.precision import resolve_precision
from hovle_data.order import hash64
from hovle_data.packing import PackedBatch
from hovle_data.pipeline import Loader, State, StepLoader
from hovle_data.quarantine import Ledger
from hovle_data.rows import RowLoader
from hovle_train import checkpoint
from hovle_train.average import WeightAverage
from hovle_train.balance import Balance, BalancedLoader
from hovle_train.build import find_hovle
from hovle_train.config import Recipe
from hovle_train.drop_path import DropPath
from hovle_train.export import export_final
from hovle_train.failure import (
    STACKS,
    Stopped,
    Watchdog,
    asked_to_stop,
    check_finite,
    clear_disk_errors,
)
from hovle_train.freeze import freeze_except, set_train_mode
from hovle_train.language_gate import LanguageGate
from hovle_train.lineage import check_finished, data_manifest
from hovle_train.lock import alone_in
from hovle_train.metrics import truncate_metrics
from hovle_train.notice import Notice
from hovle_train.observers import Observers
from hovle_train.optim import build_optimizers, lr_share, set_lr
from hovle_train.parallel import Parallel, make_parallel
from hovle_train.record import Record
from hovle_train.runs import (
    CHECKPOINTS,
    METRICS_FILE,
    RECIPE_FILE,
    STATUS_FILE,
    Run,
    is_finished,
    remove_leftovers,
    write_text,
)
from hovle_train.runtime import Runtime
from hovle_train.sharded import whole
from hovle_train.speed import Speed
from hovle_train.stages.base import make_stage
from hovle_train.step_log import StepLog
from hovle_train.storage import RemoteRun
from hovle_train.wrappers import wrap_model

logger = logging.getLogger(__name__)

# oneDNN, behind bfloat16 matmuls on a CPU, makes a kernel for each new shape, which takes longer than a small matmul
# itself. Rows of few different lengths find theirs made (benchmarks/cpu_steps.py).
LENGTHS_ON_CPU = 128


class Trainer:
    """One stage of one run on one worker: `Trainer(...).run()` from wherever the run had got to."""

    def __init__(self, recipe: Recipe, plugins: HovlePlugins, runtime: Runtime, commit: str | None = None):
        self.recipe, self.plugins, self.runtime, self.commit = recipe, plugins, runtime, commit
        self.data_state: State = {}  # what waited in packing windows behind the checkpoint resumed from
        self.stopping = False
        self.notice = Notice(runtime)
        self.balance: Balance | None = None
        self.remote = RemoteRun(recipe.train.storage_path) if recipe.train.storage_path else None
        self.gate = LanguageGate(recipe, plugins.registry, runtime)
        self.stage = make_stage(recipe, plugins.registry)
        self.observers = Observers(
            plugins, Run(recipe.path, recipe.stage.name, recipe.model_dump(mode="json"))
        )
        self.checkpoints = recipe.path / CHECKPOINTS
        self.dtype = resolve_precision(recipe.train.precision, runtime.device)
        self.speed = Speed(runtime.device, self.dtype)

    def run(self) -> None:
        """Train to the last step and export; does nothing if the run is finished already.

        Raises NonFiniteError before the update if a loss or gradient is not finite, ValueError if the recipe
        changed since the checkpoint, DiskFull, Stopped behind a checkpoint or before the first step if somebody asked
        for it, and whatever the data raises.
        """
        with clear_disk_errors(self.recipe.path):
            self._run()

    def _run(self) -> None:
        with alone_in(self.recipe.path) if self.runtime.is_main else nullcontext():
            self._run_alone()

    def _run_alone(self) -> None:
        if self.runtime.is_main:
            remove_leftovers(self.recipe.path)
            (self.recipe.path / STATUS_FILE).unlink(missing_ok=True)  # what was waited for is here
            if self.remote is not None:
                self.remote.pull_final(self.recipe)
        self.runtime.barrier()
        if is_finished(self.recipe.path):
            check_finished(self.recipe, data_manifest(self.recipe, self.stage.open))
            if self.remote is not None and self.runtime.is_main:
                self.remote.push_final(self.recipe.path)  # unless it got there already
            return
        if self.remote is not None and self.runtime.is_main:
            self.remote.check()
        self.prepare()
        self.stop_before_steps()  # all ranks wait here, where rank 0 had more to do: watchdogs start behind it
        first = self.resume()
        ledger = Ledger(
            Ledger.rank_path(self.recipe.path, self.runtime.rank),
            max_share=self.recipe.data.max_quarantine_share,
        )
        loader = self.loader(ledger)
        log = StepLog(self.recipe, self.runtime, self.observers, ledger, self.speed)
        try:
            with closing(log):
                self.train(loader, first, log)
        finally:
            if self.runtime.is_main:
                Ledger.merge(self.recipe.path)
        self.module = self.parallel.finish()
        # Every rank may hold a share of them.
        self.averages = None if self.average is None else self.average.gather()
        export_final(self)
        if self.remote is not None and self.runtime.is_main:
            self.remote.push_final(self.recipe.path)
        self.runtime.barrier()

    def train(self, loader: Loader, first: int, log: StepLog) -> None:
        """The steps from `first` to the last."""
        stacks, timeout = self.recipe.path / STACKS, self.recipe.resources.step_timeout_s
        set_train_mode(self.module)
        with (
            Watchdog(stacks, self.runtime, timeout) as watchdog,
            loader.iterate(first, self.recipe.train.steps, self.data_state) as batches,
        ):
            for step, micro_batches, data_wait_s in batches:
                tokens = sum(batch.num_tokens for batch in micro_batches)
                with self.speed.count_once(tokens):
                    learned = self.step(step, [self.place(batch) for batch in micro_batches])
                log.add(micro_batches, data_wait_s, learned)
                log.write(step, self.optimizers[0].param_groups[0]["lr"], self.balance)
                watchdog.beat()
                self.save(step, batches.state)
                watchdog.beat()

    def prepare(self) -> None:
        """Build, freeze, make optimizers and whatever the stage needs; write the resolved recipe down."""
        self.record = Record(self.recipe, self.plugins, self.commit)
        if self.runtime.is_main:
            self.recipe.path.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe.path / RECIPE_FILE, self.recipe.to_yaml())
            self.record.look_up(self.stage.open)
            self.gate.measure_before(self.record.parent_weights)
        torch.manual_seed(self.recipe.seed)
        self.module, self.processor = self.stage.build()
        self.stage.processor = self.processor
        tokenizer = self.processor.tokenizer
        self.padding_id = next(
            i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None
        )
        freeze_except(self.module, self.stage.trainable(self.module))
        self.module = wrap_model(self.plugins, self.module, self.recipe.model.wrappers)
        drop_path = self.recipe.train.drop_path
        self.drop_path = (
            None
            if drop_path is None
            else DropPath(find_hovle(self.module), drop_path, self.recipe.train.steps)
        )
        self.parallel: Parallel = make_parallel(
            self.recipe.parallel, self.module, self.stage, self.runtime, self.dtype
        )
        self.weights = self.parallel.weights
        self.optimizers = build_optimizers(self.recipe.optim, self.weights.masters)
        ema = self.recipe.optim.ema
        self.average = None if ema is None else WeightAverage(self.weights.masters, ema.decay)
        self.stage.setup(self.module, self.processor, self.runtime, self._progress)

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the first step to do."""
        if self.remote is not None:
            if self.runtime.is_main:
                self.remote.pull(self.recipe, self.record.data_manifest)
            self.runtime.barrier()
        found, first = checkpoint.newest(self.checkpoints), 0
        if found is not None:
            state = checkpoint.read_state(found)
            self.record.resume(state, found)
            checkpoint.load(found, self.weights.masters, self.remembering)
            self.weights.publish()
            self.data_state, first = state.get("data", {}), state["step"] + 1
            logger.info("resuming %s at step %d of %d", self.recipe.path, first, self.recipe.train.steps)
        if self.runtime.is_main:
            truncate_metrics(self.recipe.path / METRICS_FILE, first - 1)
        return first

    def stop_before_steps(self) -> None:
        """Raise Stopped, on all ranks, if the run was asked to stop while it was prepared: it has nothing to save."""
        asked = self.runtime.is_main and asked_to_stop(self.recipe.path)
        if self.runtime.sum({"stop": float(asked)})["stop"]:
            raise Stopped(self.recipe.path)

    @property
    def remembering(self) -> list[torch.optim.Optimizer]:
        """What has a state that checkpoints keep."""
        return [*self.optimizers, *([] if self.average is None else [self.average])]

    def loader(self, ledger: Ledger) -> Loader:
        train, data = self.recipe.train, self.recipe.data
        common: dict[str, Any] = {
            "stream": self.stage.stream(self.processor, ledger),
            "max_tokens": train.micro_batch_tokens,
            "max_tiles": train.micro_batch_tiles,
            "rank": self.runtime.rank,
            "world_size": self.runtime.world_size,
            "num_threads": data.num_threads,
            "prefetch": data.prefetch_steps,
        }
        if train.global_batch_rows is not None:
            return RowLoader(global_batch_rows=train.global_batch_rows, **common)
        assert train.global_batch_size is not None  # the recipe has one of the two
        if self.recipe.resources.balance and self.runtime.world_size > 1:
            # A loader holds its prefetched steps, one in hand, and the one that trains.
            self.balance = Balance(self.runtime, train.global_batch_size, ahead=data.prefetch_steps + 2)
            return BalancedLoader(self.balance, global_batch_size=train.global_batch_size, **common)
        return StepLoader(global_batch_size=train.global_batch_size, **common)

    def place(self, batch: PackedBatch) -> PackedBatch:
        """The batch on this worker's device, in one of few lengths (`train.pad_to_multiple_of`)."""
        multiple = self.recipe.train.pad_to_multiple_of
        if multiple == "auto":
            multiple = (
                LENGTHS_ON_CPU if self.runtime.device.type == "cpu" and self.dtype == torch.bfloat16 else 1
            )
        return batch.padded(multiple, self.padding_id).to(self.runtime.device)

    def step(self, step: int, micro_batches: Sequence[PackedBatch]) -> dict[str, float]:
        """One optimizer step over this rank's share of the global batch; returns what to log, reduced over ranks."""
        torch.manual_seed(hash64("step", self.recipe.seed, step, self.runtime.rank) % 2**63)
        if self.drop_path is not None:
            self.drop_path.set_step(step)
        totals = self.count_targets(micro_batches)
        sums = dict.fromkeys(totals, 0.0)
        started = time.perf_counter()
        for batch in self.parallel.shares(micro_batches):
            for name, value in self.parallel.backward(batch, totals).items():
                sums[name] += float(value)
        if self.balance is not None:
            tokens = sum(batch.num_tokens for batch in micro_batches)
            self.balance.add(step, tokens, time.perf_counter() - started)
        self.parallel.sync()
        norm = self._gradient_norm()
        own, stop = sums, float(self.runtime.is_main and asked_to_stop(self.recipe.path))
        tokens = sum(batch.num_tokens for batch in micro_batches)
        look = float(self.notice.due)
        sums = self.runtime.sum(own | {"stop": stop, "look": look, "tokens": tokens})
        self.stopping = bool(sums.pop("stop"))  # all ranks stop behind the same step
        if sums.pop("look"):
            self.notice.look()
        self.record.tokens += int(sums.pop("tokens"))
        keys = [key for batch in micro_batches for key in batch.keys]
        check_finite(step, norm, sums, own, keys, (self.recipe.path, self.runtime))
        set_lr(self.optimizers, lr_share(self.recipe.optim, step, self.recipe.train.steps))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        self.weights.publish()
        return {name: sums[name] / totals[name] for name in sums} | {"grad_norm": norm}

    def count_targets(self, micro_batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Targets of each kind in the whole step, over all ranks: what the losses are divided by."""
        counts: dict[str, float] = dict.fromkeys(self.stage.target_kinds, 0)
        for batch in micro_batches:
            for name, count in self.stage.targets(self.module, batch).items():
                counts[name] += count
        return {name: max(1.0, count) for name, count in self.runtime.sum(counts).items()}

    def _gradient_norm(self) -> float:
        parameters = [p for p in self.weights if p.grad is not None]
        limit = self.recipe.optim.grad_clip
        norm = nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
        return float(whole(norm))

    def save(self, step: int, data_state: State) -> None:
        """A checkpoint every `checkpoint_every` steps, and where a node is to go; written by rank 0, reported by all.

        data_state: of this rank's loader behind the step; the checkpoint has that of all ranks.
        Raises Stopped behind one if the run was asked to stop.
        """
        due = (step + 1) % self.recipe.train.checkpoint_every == 0
        due |= self.stopping | self.notice.take()
        if step + 1 == self.recipe.train.steps or not due:
            return
        data = {name: lane for rank in self.runtime.gather(data_state) for name, lane in rank.items()}
        tensors = checkpoint.gather(self.weights.masters, self.remembering, self.runtime.is_main)
        path = None
        if self.runtime.is_main:
            state, keep = self.record.to_dict() | {"data": data}, self.recipe.train.keep_checkpoints
            path = checkpoint.save(self.checkpoints, step, tensors, state, keep)
            if self.remote is not None:
                self.remote.push(path, self.recipe.path, keep)
            self.observers.on_checkpoint(step, path)
            Ledger.merge(self.recipe.path)
        self.runtime.report({"step": step}, path)
        if self.stopping:
            raise Stopped(self.recipe.path)

    def _progress(self, what: str, done: int, total: int) -> None:
        """Long work before the first step, for whoever follows the run's folder, or wants it to stop.

        Of several ranks the others wait for this one, and hear of it when it is done.
        """
        if self.runtime.world_size == 1:
            self.stop_before_steps()
        (self.recipe.path / STATUS_FILE).write_text(f"{what} {done:,} of {total:,}")
