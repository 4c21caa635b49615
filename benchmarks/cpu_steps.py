"""What a small bfloat16 training step on a CPU loses to its surroundings: kernels for new shapes, sleeping threads, and
a thread that reads beside it.

oneDNN makes a kernel for every new shape, so packed rows of ever new lengths are compared with rows padded to a
multiple of 128 (`train.pad_to_multiple_of`), useful tokens a second each. libgomp's threads sleep between operations
with OMP_WAIT_POLICY=PASSIVE and wake slowly; processes with GOMP_SPINCOUNT as `hovle train` sets it for a worker alone
are compared with such ones. Reading is Python's work of about a millisecond a sample, 64 samples a step: by a thread
ahead of the steps, or between them (`data.prefetch_steps` 2 and 0). Peers alternate; the last line is one JSON object.
Alone on the machine: three minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 256, 704, 4, 2000
ROUNDS = 3
STEPS = 12


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip


def measure() -> dict[str, float]:
    """Median tokens/s of training steps at new lengths and at lengths padded to 128, in this process."""
    import torch
    from transformers import LlamaForCausalLM

    from hovle_train.loop import LENGTHS_ON_CPU

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).bfloat16().train()

    def step(length: int) -> float:
        ids = torch.randint(0, VOCAB, (1, length))
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        return time.perf_counter() - started

    speeds: dict[str, list[float]] = {"new": [], "padded": []}
    lengths = torch.randperm(1024)[: STEPS + 2].add(1024).tolist()
    for length in range(1024, 2049, LENGTHS_ON_CPU):
        step(length)  # every padded length was met once, as in any longer run
    for n, length in enumerate(lengths):
        padded = length + -length % LENGTHS_ON_CPU
        for name, taken in (("new", step(length)), ("padded", step(padded))):
            if n >= 2:
                speeds[name].append(length / taken)
    return {name: statistics.median(values) for name, values in speeds.items()}


class Chats:
    """A stream whose samples cost what a chat costs: templates, records and keys, all of it Python's."""

    record = json.dumps([{"role": "user", "content": ["word " * 5] * 4}] * 40)

    def get(self, k: int) -> Any:
        import numpy as np

        from hovle_core.processor import Encoded

        for _ in range(6):
            assert len(json.dumps(json.loads(self.record))) > 0
        ids = np.arange(k, k + 26, dtype=np.int64) % VOCAB
        return Encoded(ids, ids, np.zeros((0, 14, 14, 3), np.uint8), key=str(k))


def measure_reading() -> dict[str, float]:
    """Median tokens/s of training steps with their reading, by a thread ahead of them and between them."""
    import torch
    from transformers import LlamaForCausalLM

    from hovle_data.pipeline import StepLoader

    model = LlamaForCausalLM(llama()).bfloat16().train()

    def speed(prefetch: int, start: int) -> float:
        taken = []
        with StepLoader(Chats(), 64, 4096, 1, prefetch=prefetch).iterate(start, start + STEPS) as steps:
            at = time.perf_counter()
            for _, batches, _ in steps:
                for batch in batches:
                    ids = batch.padded(128, 0).input_ids
                    model(input_ids=ids, labels=ids).loss.backward()
                model.zero_grad()
                taken.append(time.perf_counter() - at)
                at = time.perf_counter()
        return 64 * 26 / statistics.median(taken[2:])

    torch.manual_seed(0)
    rounds = [(speed(2, n), speed(0, n)) for n in range(ROUNDS)]
    return {
        "beside": statistics.median(one for one, _ in rounds),
        "between": statistics.median(two for _, two in rounds),
    }


def child(spins: int, what: str = "steps") -> dict[str, float]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(spins)}
    command = [sys.executable, __file__, "--child", what]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--child", choices=("steps", "reading"), help="measure in this process; used by the script itself"
    )
    if which := parser.parse_args().child:
        print(json.dumps(measure() if which == "steps" else measure_reading()))
        return
    from hovle_core.openmp import SPINS

    asleep, awake = [], []
    for _ in range(ROUNDS):
        asleep.append(child(0))
        awake.append(child(int(SPINS)))
        print(f"tokens/s asleep {asleep[-1]}, awake {awake[-1]}", flush=True)

    reading = child(int(SPINS), "reading")
    print(f"tokens/s with reading {reading}", flush=True)

    def median(rounds: list[dict[str, float]], name: str) -> float:
        return statistics.median(one[name] for one in rounds)

    result = {
        "benchmark": "cpu_steps",
        "ratio_padded": round(median(awake, "padded") / median(awake, "new"), 2),
        "ratio_awake": round(median(awake, "padded") / median(asleep, "padded"), 2),
        "ratio_both": round(median(awake, "padded") / median(asleep, "new"), 2),
        "ratio_reading_between": round(reading["between"] / reading["beside"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
