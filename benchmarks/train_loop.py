"""What Ray Train and the loop cost beside the work itself: a step of `hovle train` on Ray against a bare loop.

The bare loop is this process, without Ray: batches that are in memory already, loss, backward, clipping, optimizer,
in the same precision. The other is the command itself, in processes of its own: Ray Train, shards read and pictures
decoded beside the steps, metrics of every step. They take turns (bare, Ray, bare, Ray, bare), each over the same steps;
the model has the size of the demo's. Also: how long a step waits for data, and the time from the command to its first
step.
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
STEPS, WARM_UP, SAMPLES, ROUNDS = 50, 15, 64, 2
CAPTION = "a picture of noise, one of many like it, with nothing in it that anybody could name"


def make_world(folder: Path) -> None:
    """An LLM of the demo's size and 2,000 pairs of a picture and a caption."""
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

    samples = (Sample(f"p{n}", images=(picture(),), text=f"{CAPTION}, number {n}") for n in range(2000))
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
        "observers": {"wandb": "disabled"},
    }


class BareLoop:
    """The loop without anything around it."""

    def __init__(self, folder: Path):
        parsed = parse_recipe(recipe(folder, "bare"))
        self.trainer = Trainer(parsed, load_plugins(), Runtime())
        self.trainer.prepare()
        loader = self.trainer.loader(Ledger(None, max_share=1.0))
        self.batches = [loader.batches(step) for step in range(STEPS)]

    def run(self) -> list[float]:
        """Seconds of each step."""
        trainer, seconds = self.trainer, []
        set_train_mode(trainer.module)
        for micro_batches in self.batches:
            start = time.perf_counter()
            targets = float(sum(batch.num_target_tokens for batch in micro_batches))
            for batch in micro_batches:
                loss, _ = trainer.stage.loss(trainer.module, batch, {"loss": targets})
                loss.backward()
                trainer.weights.collect()
            nn.utils.clip_grad_norm_(list(trainer.weights), 1.0)
            for optimizer in trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            trainer.weights.publish()
            seconds.append(time.perf_counter() - start)
        return seconds[WARM_UP:]


def run_on_ray(folder: Path, name: str) -> tuple[list[float], list[float], float]:
    """Seconds of each step of the command, the shares of them that waited for data, and seconds to the first step."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, name)))
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


def main() -> None:
    torch.manual_seed(0)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_world(folder)
        loop = BareLoop(folder)
        loop.run()
        bare, rays, waits, firsts = [statistics.median(loop.run())], [], [], []
        for number in range(ROUNDS):
            steps, waited, first = run_on_ray(folder, f"ray{number}")
            rays.append(statistics.median(steps))
            waits.append(statistics.fmean(waited))
            firsts.append(first)
            bare.append(statistics.median(loop.run()))
    print(f"{loop.trainer.dtype}, {torch.get_num_threads()} threads, {SAMPLES} pictures a step")
    print("bare step: " + ", ".join(f"{1000 * s:.0f}" for s in bare) + " ms")
    print("on Ray:    " + ", ".join(f"{1000 * s:.0f}" for s in rays) + " ms")
    pairs = [ray / ((before + after) / 2) for ray, before, after in zip(rays, bare, bare[1:], strict=False)]
    result = {
        "ratio": round(statistics.fmean(pairs), 3),
        "data_wait_share": round(statistics.fmean(waits), 4),
        "first_step_s": round(statistics.fmean(firsts), 1),
    }
    print(json.dumps({"benchmark": "train_loop", **result}))


if __name__ == "__main__":
    main()
