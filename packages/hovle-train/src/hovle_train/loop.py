"""The one loop. It knows steps, batches, gradients and checkpoints, and of a stage only its interface.

Everything random in step s is drawn from (seed, s, rank), data order is a function of the position and learning
rates of the step; so a run that was killed continues with the very numbers of one that was not.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hovle_core.plugins import HovlePlugins
from hovle_data.order import hash64
from hovle_data.packing import PackedBatch
from hovle_data.pipeline import Loader, State, StepLoader
from hovle_data.quarantine import Ledger
from hovle_data.rows import RowLoader
from hovle_train import checkpoint
from hovle_train.config import Recipe
from hovle_train.export import export_final
from hovle_train.fill import Fill
from hovle_train.freeze import freeze_except, set_train_mode
from hovle_train.lineage import check_finished, check_parent, check_same, parent_of, plugins_of, weights_hash
from hovle_train.metrics import MetricsWriter, Window, truncate_metrics
from hovle_train.observers import Observers
from hovle_train.optim import build_optimizers, lr_share, set_lr
from hovle_train.parallel import sync_gradients
from hovle_train.runs import METRICS_FILE, RECIPE_FILE, STATUS_FILE, Run, is_finished
from hovle_train.runtime import Runtime, resolve_precision
from hovle_train.stages.base import Stage
from hovle_train.weights import Weights
from hovle_train.wrappers import wrap_model

logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError, ValueError):
    """A loss or gradient that is not finite; the weights are those before the step."""


class Trainer:
    """One stage of one run on one worker: `Trainer(...).run()` from wherever the run had got to."""

    def __init__(self, recipe: Recipe, plugins: HovlePlugins, runtime: Runtime, commit: str | None = None):
        self.recipe, self.plugins, self.runtime, self.commit = recipe, plugins, runtime, commit
        # Of earlier starts, once resumed: a run's cost is that of all of them.
        self.seconds, self.tokens, self.started = 0.0, 0, time.perf_counter()
        self.parent_weights: str | None = None  # known to rank 0, from `prepare` on
        self.data_state: State = {}  # what waited in packing windows behind the checkpoint resumed from
        self.fill = Fill(recipe.train, runtime)
        self.stage: Stage = plugins.registry.build(
            "stage", recipe.stage.name, recipe=recipe, registry=plugins.registry
        )
        self.run_info = Run(recipe.path, recipe.stage.name, recipe.model_dump(mode="json"))
        self.observers = Observers(plugins, self.run_info)
        self.checkpoints = recipe.path / "checkpoints"
        self.dtype = resolve_precision(recipe.train.precision, runtime.device)

    def run(self) -> None:
        """Train to the last step and export; does nothing if the run is finished already.

        Raises NonFiniteError before the update if a loss or gradient is not finite, ValueError if the recipe
        changed since the checkpoint, and whatever the data raises.
        """
        if is_finished(self.recipe.path):
            check_finished(self.recipe)
            return
        self.started = time.perf_counter()
        self.prepare()
        first = self.resume()
        ledger = Ledger(
            Ledger.rank_path(self.recipe.path, self.runtime.rank),
            max_share=self.recipe.data.max_quarantine_share,
        )
        writer = MetricsWriter(self.recipe.path / METRICS_FILE) if self.runtime.is_main else None
        loader = self.loader(ledger)
        try:
            self.train(loader, first, writer, ledger)
        finally:
            if self.runtime.is_main:
                Ledger.merge(self.recipe.path)
        if writer is not None:
            writer.close()
        self.weights.restore(self.module)
        export_final(self)
        self.runtime.barrier()

    def train(self, loader: Loader, first: int, writer: MetricsWriter | None, ledger: Ledger) -> None:
        """The steps from `first` to the last."""
        window = Window()
        with loader.iterate(first, self.recipe.train.steps, self.data_state) as batches:
            for step, micro_batches, data_wait_s in batches:
                logged = self.step(step, [batch.to(self.runtime.device) for batch in micro_batches])
                self.tokens += sum(batch.num_tokens for batch in micro_batches)
                window.add(
                    data_wait_s=data_wait_s, tokens=sum(batch.num_tokens for batch in micro_batches), steps=1
                )
                window.add(samples=sum(len(batch.keys) for batch in micro_batches), **logged)
                self.fill.add(micro_batches)
                self.log(step, window, writer, ledger)
                self.save(step, batches.state)

    def prepare(self) -> None:
        """Build, freeze, make optimizers and whatever the stage needs; write the resolved recipe down."""
        if self.runtime.is_main:
            self.recipe.path.mkdir(parents=True, exist_ok=True)
            (self.recipe.path / RECIPE_FILE).write_text(self.recipe.to_yaml())
            # Before it is read: a parent that changes meanwhile is then noticed.
            parent = parent_of(self.recipe)
            self.parent_weights = weights_hash(parent)
            for change in self.plugins.changed_since(plugins_of(parent)):
                logger.warning("%s: %s", parent, change)
        torch.manual_seed(self.recipe.seed)
        self.module, self.processor = self.stage.build()
        self.stage.processor = self.processor
        self.module.to(self.runtime.device)
        freeze_except(self.module, self.stage.trainable(self.module))
        self.module = wrap_model(self.plugins, self.module, self.recipe.model.wrappers)
        self.weights = Weights(self.module, self.dtype)
        self.optimizers = build_optimizers(self.recipe.optim, self.weights.masters)
        self.stage.setup(self.module, self.processor, self.runtime, self._progress)

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the first step to do."""
        found = checkpoint.complete_checkpoints(self.checkpoints)
        first = 0
        if found:
            state = checkpoint.read_state(found[-1])
            check_same(state["recipe"], self.recipe, f"checkpoint {found[-1]}")
            recorded = state.get("parent_weights")
            check_parent(recorded, self.parent_weights, self.recipe, f"checkpoint {found[-1]}")
            checkpoint.load(found[-1], self.weights.masters, self.optimizers)
            self.weights.publish()
            for change in self.plugins.changed_since(state["plugins"]):
                logger.warning("%s: results may differ from those of an uninterrupted run", change)
            self.seconds, self.tokens, self.data_state = (
                state["seconds"],
                state["tokens"],
                state.get("data", {}),
            )
            first = state["step"] + 1
            logger.info("resuming %s at step %d of %d", self.recipe.path, first, self.recipe.train.steps)
        if self.runtime.is_main:
            truncate_metrics(self.recipe.path / METRICS_FILE, first - 1)
        return first

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
        return StepLoader(global_batch_size=train.global_batch_size, **common)

    def step(self, step: int, micro_batches: Sequence[PackedBatch]) -> dict[str, float]:
        """One optimizer step over this rank's share of the global batch; returns what to log, reduced over ranks."""
        torch.manual_seed(hash64("step", self.recipe.seed, step, self.runtime.rank) % 2**63)
        set_train_mode(self.module)
        totals = self.count_targets(micro_batches)
        sums = dict.fromkeys(totals, 0.0)
        for batch in micro_batches:
            loss, logged = self.stage.loss(self.module, batch, totals)
            loss.backward()
            self.weights.collect()
            for name, value in logged.items():
                sums[name] += float(value)
        sync_gradients(self.weights, self.runtime.world_size)
        norm = self._gradient_norm()
        sums = self.runtime.sum(sums)
        if not all(map(torch.isfinite, map(torch.tensor, [norm, *sums.values()]))):
            keys = [key for batch in micro_batches for key in batch.keys]
            raise NonFiniteError(
                f"step {step}: loss or gradient is not finite ({sums}, gradient norm {norm}); stopped before the "
                f"update. Samples of rank {self.runtime.rank}: {keys}"
            )
        set_lr(self.optimizers, lr_share(self.recipe.optim, step, self.recipe.train.steps))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
        return float(nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit))

    def log(self, step: int, window: Window, writer: MetricsWriter | None, ledger: Ledger) -> None:
        last = step + 1 == self.recipe.train.steps
        if (step + 1) % self.recipe.train.log_every and not last:
            return
        sums, seconds = window.sums, window.seconds
        steps = sums.pop("steps")
        tokens, samples, waited = (sums.pop(name) for name in ("tokens", "samples", "data_wait_s"))
        counted = self.runtime.sum(
            {"tokens": tokens, "samples": samples, "bad": ledger.num_bad, "truncated": ledger.num_truncated}
        )
        metrics: dict[str, Any] = {name: value / steps for name, value in sums.items()}
        metrics |= self.fill.measure()
        metrics |= {
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "tokens_per_s": counted["tokens"] / seconds,
            "samples_per_s": counted["samples"] / seconds,
            "data_wait_share": waited / seconds,
            "quarantined": int(counted["bad"]),
            "truncated": int(counted["truncated"]),
        }
        if writer is not None:
            writer.write(step, metrics)
            self.observers.on_log(step, metrics)
        window.reset()

    def save(self, step: int, data_state: State) -> None:
        """A checkpoint every `checkpoint_every` steps, written by rank 0 and reported to Ray by all.

        data_state: of this rank's loader behind the step; the checkpoint has that of all ranks.
        """
        if (step + 1) % self.recipe.train.checkpoint_every or step + 1 == self.recipe.train.steps:
            return
        data = {name: lane for rank in self.runtime.gather(data_state) for name, lane in rank.items()}
        path = None
        if self.runtime.is_main:
            state = {
                "seconds": self.seconds + time.perf_counter() - self.started,
                "tokens": self.tokens,
                "data": data,
                "recipe": self.run_info.recipe,
                "plugins": self.plugins.versions,
                "parent_weights": self.parent_weights,
            }
            keep = self.recipe.train.keep_checkpoints
            path = checkpoint.save(self.checkpoints, step, self.weights.masters, self.optimizers, state, keep)
            self.observers.on_checkpoint(step, path)
            Ledger.merge(self.recipe.path)
        self.runtime.report({"step": step}, path)

    def _progress(self, what: str, done: int, total: int) -> None:
        """Long work before the first step, for whoever follows the run's folder."""
        (self.recipe.path / STATUS_FILE).write_text(f"{what} {done:,} of {total:,}")
