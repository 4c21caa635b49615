"""What Ray Train and the loop cost beside the work itself: a step of `hovle train` against a bare loop.

The bare loop is a process without Ray: the same batches from the same loader, loss, backward, clipping, optimizer, in
the same precision. The others are the command itself, on Ray and with `--local`, with all it does around a step: agreed
stops, checks, metrics of every step, reports to Ray. The model has the size of the demo's.

They take turns of a few steps, since a shared machine drifts by more in a minute than what is measured here: while one
computes, the others, with all of Ray's processes, are stopped (SIGSTOP). A turn's first steps do not count. Two
processes of one program differ, too, by where their memory came to lie and for as long as they live: all start anew a
few times. `ratio`, and `ratio_local` without Ray, are means over these starts of the median turn, the command's steps
by the bare ones before and after: what the host takes for others falls on single turns of any. `_error` is the
standard error over starts. In `ratio` a step computes on all cores, and what Ray's processes need is taken from it;
in `ratio_spare_core` all compute on one core less, which is Ray's, as where a GPU computes. Also: how long a step on
Ray waits for data, and the time from the command to its first step. About 25 minutes on two cores.
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
DTYPE = str(resolve_precision("auto", torch.device("cpu"))).removeprefix("torch.")
CORES = torch.get_num_threads()
# A step takes about half a second, and a turn so long that what Ray catches up with at its beginning is over.
SAMPLES_A_CORE = {"bfloat16": 32, "float32": 8}[DTYPE]
STARTS, TURNS, STEPS_A_TURN, UNCOUNTED = 3, 5, 16, 4
STEPS = 1000  # more than any comes to: all are ended in the middle
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

    samples = (Sample(f"p{n}", images=(picture(),), text=f"{CAPTION}, number {n}") for n in range(1280))
    write_shards(samples, folder / "pairs")


def recipe(folder: Path, name: str, threads: int = CORES) -> dict[str, Any]:
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
        "train": {"steps": STEPS, "global_batch_size": SAMPLES_A_CORE * threads, "log_every": 1},
        "resources": {"cpus_per_worker": threads},
        "observers": {"wandb": "disabled"},
    }


def bare_loop(folder: Path) -> None:
    """The loop without anything around it but the loader; writes a line of metrics a step."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    trainer = Trainer(parse_recipe(recipe(folder, "bare", threads)), load_plugins(), Runtime())
    samples = SAMPLES_A_CORE * threads
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
            writer.write(step, {"samples_per_s": samples / (now - start)})
            start = now


class Runner:
    """A training process with all of its children, stopped but for its turns."""

    def __init__(self, command: list[str], run_dir: Path, threads: int):
        self.metrics = run_dir / METRICS_FILE
        self._log = run_dir.with_suffix(".log")
        self._start = time.perf_counter()
        with self._log.open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            self._process = psutil.Popen(command, stdout=log, stderr=log, env=environment)

    def start(self) -> float:
        """Wait for the first step; seconds that it took."""
        self._wait_for(1)
        seconds = time.perf_counter() - self._start
        self._signal(signal.SIGSTOP)
        return seconds

    def turn(self) -> list[dict[str, Any]]:
        """Metrics of a turn's steps without the first: one was stopped in the middle, and behind it Ray's processes
        catch up with what they missed."""
        done = len(read_metrics(self.metrics))
        self._signal(signal.SIGCONT)
        self._wait_for(done + STEPS_A_TURN)
        self._signal(signal.SIGSTOP)
        return read_metrics(self.metrics)[done + UNCOUNTED : done + STEPS_A_TURN]

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
    """Mean time that a sample takes in these steps."""
    return statistics.fmean(1 / line["samples_per_s"] for line in turn)


def compare(folder: Path, threads: int, ratios: dict[str, list[list[float]]]) -> tuple[float, float]:
    """One start of all: appends each command's ratios by turn; data wait share and seconds to the first step on Ray."""
    make_world(folder)
    hovle_train = [sys.executable, "-m", "hovle_core.cli", "train"]
    commands = {
        "bare": [sys.executable, __file__, str(folder)],
        "local": [*hovle_train, str(folder / "local.yaml"), "--local"],
        "ray": [*hovle_train, str(folder / "ray.yaml")],
    }
    with ExitStack() as ending:
        runners, first = {}, {}
        for name in ("bare", *ratios):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe(folder, name, threads)))
            runners[name] = Runner(commands[name], folder / name, threads)
            ending.callback(runners[name].end)
            first[name] = runners[name].start()
        for runner in runners.values():  # the first steps are slower
            runner.turn()
        before, waits = seconds(runners["bare"].turn()), []
        for of_starts in ratios.values():
            of_starts.append([])
        for _ in range(TURNS):
            turns = {name: runners[name].turn() for name in ratios}
            after = seconds(runners["bare"].turn())
            for name, turn in turns.items():
                ratios[name][-1].append(2 * seconds(turn) / (before + after))
            waits += [line["data_wait_share"] for line in turns["ray"]]
            print("  ".join(f"{name} {values[-1][-1]:.3f}" for name, values in ratios.items()), flush=True)
            before = after
    return statistics.fmean(waits), first["ray"]


def averages(name: str, ratios: list[list[float]]) -> dict[str, float]:
    """Mean over starts of their median turns, and its standard error."""
    medians = [statistics.median(turns) for turns in ratios]
    return {
        name: round(statistics.fmean(medians), 3),
        f"{name}_error": round(statistics.stdev(medians) / len(medians) ** 0.5, 3),
    }


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is stopped is ended
    torch.manual_seed(0)
    every: dict[str, list[list[float]]] = {"ray": [], "local": []}
    spare: dict[str, list[list[float]]] = {"ray": []}
    waits, first_steps = [], []
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory() as temporary:
            wait, first_step = compare(Path(temporary) / "every", CORES, every)
            if CORES > 1:
                compare(Path(temporary) / "spare", CORES - 1, spare)
        waits.append(wait)
        first_steps.append(first_step)
    result = {
        "benchmark": "train_loop",
        **averages("ratio", every["ray"]),
        **averages("ratio_local", every["local"]),
        **(averages("ratio_spare_core", spare["ray"]) if CORES > 1 else {}),
        "data_wait_share": round(statistics.fmean(waits), 4),
        "first_step_s": round(statistics.median(first_steps), 1),
        "cores": CORES,
        "dtype": DTYPE,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    if "GOMP_SPINCOUNT" not in os.environ:  # how a run's only worker waits; it is read when torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GOMP_SPINCOUNT": SPINS})
    bare_loop(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
