"""What Ray Train and the loop cost beside the work itself: a step of `hovle train` on Ray against a bare loop.

The bare loop is a process without Ray: the same batches from the same loader, loss, backward, clipping, optimizer, in
the same precision. The other is the command itself, with all it does around a step: agreed stops, checks, metrics of
every step, reports to Ray. The model has the size of the demo's.

They take turns of a few steps, since a shared machine drifts by more in a minute than what is measured here: while one
computes, the other, with all of Ray's processes, is stopped (SIGSTOP). The first step of a turn does not count. `ratio`
is the mean over turns of the command's steps by the bare ones before and after, `ratio_error` its standard error. Also:
how long a step waits for data, and the time from the command to its first step. About three minutes on two cores with
AMX, ten without.
"""

import io
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hovle_core.openmp import SPINS
from hovle_core.plugins import load_plugins
from hovle_core.precision import resolve_precision
from hovle_core.testing import tiny_tokenizer
from hovle_data.quarantine import Ledger
from hovle_data.schema import Sample
from hovle_data.shards import write_shards
from hovle_train.freeze import set_train_mode
from hovle_train.loop import Trainer
from hovle_train.metrics import MetricsWriter, read_metrics
from hovle_train.recipe_file import parse_recipe
from hovle_train.runs import METRICS_FILE
from hovle_train.runtime import Runtime

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}
TURNS, STEPS_A_TURN, SAMPLES = 24, 3, 64
BLOCK = 4  # turns whose mean counts as one for the error: neighbours share a bare turn
STEPS = 400  # more than either comes to: both are ended in the middle
CAPTION = "a picture of noise, one of many like it, with nothing in it that anybody could name"


def make_world(folder: Path) -> None:
    """An LLM of the demo's size and pairs of a picture and a caption."""
    draw = np.random.default_rng(0)
    tokenizer = tiny_tokenizer([CAPTION])
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **SIZES))
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")

    def picture() -> bytes:
        out = io.BytesIO()
        small = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC).save(out, "JPEG")
        return out.getvalue()

    samples = (
        Sample(f"p{n}", images=(picture(),), text=f"{CAPTION}, number {n}") for n in range(20 * SAMPLES)
    )
    write_shards(samples, folder / "pairs")


def recipe(folder: Path, name: str) -> dict[str, Any]:
    return {
        "stage": {"name": "instruction_tuning"},
        "run_dir": str(folder / name),
        "model": {
            "backbone": {"name": "transformers", "options": {"path": str(folder / "llm")}},
            "embedding": {"num_hidden_layers": 4, "image_size": 112},
            "image": {"max_tiles": 1},
        },
        "data": {"sources": [{"path": str(folder / "pairs")}]},
        "optim": {"lr": 1e-3},
        "train": {"steps": STEPS, "global_batch_size": SAMPLES, "log_every": 1},
        "resources": {"cpus_per_worker": torch.get_num_threads()},
        "observers": {"wandb": "disabled"},
    }


def bare_loop(folder: Path) -> None:
    """The loop without anything around it but the loader; writes a line of metrics a step."""
    torch.manual_seed(0)
    trainer = Trainer(parse_recipe(recipe(folder, "bare")), load_plugins(), Runtime())
    trainer.prepare()
    set_train_mode(trainer.module)
    writer = MetricsWriter(trainer.recipe.path / METRICS_FILE)
    with trainer.loader(Ledger(None, max_share=1.0)).iterate(0, STEPS) as steps:
        start = time.perf_counter()
        for step, micro_batches, _ in steps:
            targets = float(sum(batch.num_target_tokens for batch in micro_batches))
            for batch in map(trainer.place, micro_batches):
                loss, _ = trainer.stage.loss(trainer.module, batch, {"loss": targets})
                loss.backward()
                trainer.weights.collect()
            nn.utils.clip_grad_norm_(list(trainer.weights), 1.0)
            for optimizer in trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            trainer.weights.publish()
            now = time.perf_counter()
            writer.write(step, {"samples_per_s": SAMPLES / (now - start)})
            start = now


class Runner:
    """A training process with all of its children, stopped but for its turns."""

    def __init__(self, command: list[str], run_dir: Path):
        self.metrics = run_dir / METRICS_FILE
        self._log = run_dir.with_suffix(".log")
        self._start = time.perf_counter()
        with self._log.open("w") as log:
            self._process = psutil.Popen(command, stdout=log, stderr=log)

    def start(self) -> float:
        """Wait for the first step; seconds that it took."""
        self._wait_for(1)
        seconds = time.perf_counter() - self._start
        self._signal(signal.SIGSTOP)
        return seconds

    def turn(self) -> list[dict[str, Any]]:
        """Metrics of a turn's steps without its first one, which was stopped in the middle."""
        done = len(read_metrics(self.metrics))
        self._signal(signal.SIGCONT)
        self._wait_for(done + STEPS_A_TURN)
        self._signal(signal.SIGSTOP)
        return read_metrics(self.metrics)[done + 1 : done + STEPS_A_TURN]

    def end(self) -> None:
        everything = self._everything()
        self._signal(signal.SIGCONT)
        with suppress(psutil.NoSuchProcess):
            self._process.terminate()
        _, alive = psutil.wait_procs(everything, timeout=60)
        for process in alive:
            process.kill()

    def _everything(self) -> list[psutil.Process]:
        if not self._process.is_running():
            return []
        return [self._process, *self._process.children(recursive=True)]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._everything():
            with suppress(psutil.NoSuchProcess):  # Ray ends some that it does not need
                process.send_signal(number)

    def _wait_for(self, lines: int) -> None:
        while not self.metrics.is_file() or self.metrics.read_bytes().count(b"\n") < lines:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._process.args} ended: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)


def seconds(turn: list[dict[str, Any]]) -> float:
    return statistics.fmean(SAMPLES / line["samples_per_s"] for line in turn)


def compare(folder: Path) -> dict[str, float]:
    (folder / "ray.yaml").write_text(yaml.safe_dump(recipe(folder, "ray")))
    with ExitStack() as ending:
        bare = Runner([sys.executable, __file__, str(folder)], folder / "bare")
        ending.callback(bare.end)
        bare.start()
        ray = Runner(
            [sys.executable, "-m", "hovle_core.cli", "train", str(folder / "ray.yaml")], folder / "ray"
        )
        ending.callback(ray.end)
        first = ray.start()
        for runner in (bare, ray):  # the first steps are slower
            runner.turn()
        before, ratios, waits = seconds(bare.turn()), [], []
        for _ in range(TURNS):
            turn = ray.turn()
            after = seconds(bare.turn())
            ratios.append(2 * seconds(turn) / (before + after))
            waits += [line["data_wait_share"] for line in turn]
            print(f"on Ray {seconds(turn):.3f} s, bare {before:.3f} and {after:.3f} s", flush=True)
            before = after
    blocks = [statistics.fmean(ratios[i : i + BLOCK]) for i in range(0, TURNS, BLOCK)]
    return {
        "ratio": round(statistics.fmean(ratios), 3),
        "ratio_error": round(statistics.stdev(blocks) / len(blocks) ** 0.5, 3),
        "data_wait_share": round(statistics.fmean(waits), 4),
        "first_step_s": round(first, 1),
    }


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is stopped is ended
    torch.manual_seed(0)
    dtype = resolve_precision("auto", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        make_world(Path(temporary))
        result = compare(Path(temporary))
    about = {"threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch.")}
    print(json.dumps({"benchmark": "train_loop", **result, **about}))


if __name__ == "__main__":
    if "GOMP_SPINCOUNT" not in os.environ:  # how a run's only worker waits; it is read when torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GOMP_SPINCOUNT": SPINS})
    bare_loop(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
