"""What Ray Train and the loop cost beside the work itself: a step of `hovle train` on Ray against a bare loop.

The bare loop is this process, without Ray: the same batches from the same loader, loss, backward, clipping, optimizer,
in the same precision. The other is the command itself, in processes of its own, with all it does around a step: agreed
stops, checks, metrics of every step, reports to Ray. They take turns (bare, Ray, bare, Ray, bare), each over the same
steps; the model has the size of the demo's. Medians over the steps behind the first ones, each Ray run's over those of
the bare ones before and after it. Also: how long a step waits for data, and the time from the command to its first
step.

`ratio` is with a thread on every core, as the demo trains: Ray's own processes then take their share of the same cores,
and whoever waits for one thread waits for both. `ratio_with_a_core_free` is with one thread less for both sides.

About six minutes on two cores with AMX and nothing beside it, twenty without AMX.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hovle_core.openmp import SPINS
from hovle_core.plugins import load_plugins
from hovle_core.testing import tiny_tokenizer
from hovle_data.quarantine import Ledger
from hovle_data.schema import Sample
from hovle_data.shards import write_shards
from hovle_train.freeze import set_train_mode
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.recipe_file import parse_recipe
from hovle_train.runtime import Runtime

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}
STEPS, WARM_UP, SAMPLES, ROUNDS = 20, 6, 64, 2
CAPTION = "a picture of noise, one of many like it, with nothing in it that anybody could name"


def make_world(folder: Path) -> None:
    """An LLM of the demo's size and pairs of a picture and a caption, one for each sample of the run."""
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
        Sample(f"p{n}", images=(picture(),), text=f"{CAPTION}, number {n}") for n in range(STEPS * SAMPLES)
    )
    write_shards(samples, folder / "pairs")


def recipe(folder: Path, name: str, threads: int) -> dict[str, Any]:
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
        "resources": {"cpus_per_worker": threads},
        "observers": {"wandb": "disabled"},
    }


class BareLoop:
    """The loop without anything around it but the loader."""

    def __init__(self, folder: Path):
        parsed = parse_recipe(recipe(folder, "bare", torch.get_num_threads()))
        self.trainer = Trainer(parsed, load_plugins(), Runtime())
        self.trainer.prepare()

    def run(self) -> float:
        """The median of a step's seconds."""
        trainer, seconds = self.trainer, []
        set_train_mode(trainer.module)
        with trainer.loader(Ledger(None, max_share=1.0)).iterate(0, STEPS) as steps:
            start = time.perf_counter()
            for _, micro_batches, _ in steps:
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
                seconds.append(now - start)
                start = now
        return statistics.median(seconds[WARM_UP:])


def run_on_ray(folder: Path, name: str, threads: int) -> tuple[list[float], list[float], float]:
    """Seconds of each step of the command, the shares of them that waited for data, and seconds to the first step."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, name, threads)))
    metrics = folder / name / "metrics.jsonl"
    start = time.perf_counter()
    command = [sys.executable, "-m", "hovle_core.cli", "train", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.05)
        first = time.perf_counter() - start
        _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"hovle train ended with {process.returncode}: {errors[-2000:]}")
    lines = read_metrics(metrics)[WARM_UP:]
    return (
        [SAMPLES / line["samples_per_s"] for line in lines],
        [line["data_wait_share"] for line in lines],
        first,
    )


def compare(loop: BareLoop, folder: Path, threads: int) -> tuple[float, float, float]:
    """The ratio of a step's time on so many threads, the share of it that waits for data, seconds to the first."""
    torch.set_num_threads(threads)
    bare, rays, waits, firsts = [loop.run()], [], [], []
    for number in range(ROUNDS):
        steps, waited, first = run_on_ray(folder, f"ray{threads}-{number}", threads)
        rays.append(statistics.median(steps))
        waits.append(statistics.fmean(waited))
        firsts.append(first)
        bare.append(loop.run())
    print(f"{loop.trainer.dtype}, {threads} threads, {SAMPLES} pictures a step")
    print("bare step: " + ", ".join(f"{1000 * s:.0f}" for s in bare) + " ms")
    print("on Ray:    " + ", ".join(f"{1000 * s:.0f}" for s in rays) + " ms", flush=True)
    pairs = [ray / ((before + after) / 2) for ray, before, after in zip(rays, bare, bare[1:], strict=False)]
    return statistics.fmean(pairs), statistics.fmean(waits), statistics.fmean(firsts)


def main() -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_world(folder)
        loop = BareLoop(folder)
        ratio, waited, first = compare(loop, folder, threads)
        result = {
            "ratio": round(ratio, 3),
            "data_wait_share": round(waited, 4),
            "first_step_s": round(first, 1),
            "threads": threads,
        }
        if threads > 1:
            result["ratio_with_a_core_free"] = round(compare(loop, folder, threads - 1)[0], 3)
    print(json.dumps({"benchmark": "train_loop", **result}))


if __name__ == "__main__":
    if "GOMP_SPINCOUNT" not in os.environ:  # how a run's only worker waits; it is read when torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GOMP_SPINCOUNT": SPINS})
    main()
