"""What a small bfloat16 training step on a CPU loses to its surroundings: kernels for new shapes, and sleeping threads.

oneDNN makes a kernel for every new shape, so packed rows of ever new lengths are compared with rows padded to a
multiple of 128 (`train.pad_to_multiple_of`), useful tokens a second each. libgomp's threads sleep between operations
with OMP_WAIT_POLICY=PASSIVE and wake slowly; processes with GOMP_SPINCOUNT as `hovle train` sets it for a worker alone
are compared with such ones. Peers alternate; the last line is one JSON object. Alone on the machine: two minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 256, 704, 4, 2000
ROUNDS = 3
STEPS = 12


def measure() -> dict[str, float]:
    """Median tokens/s of training steps at new lengths and at lengths padded to 128, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hovle_train.loop import LENGTHS_ON_CPU

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().train()

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


def child(spins: int) -> dict[str, float]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(spins)}
    command = [sys.executable, __file__, "--child"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--child", action="store_true", help="measure in this process; used by the script itself"
    )
    if parser.parse_args().child:
        print(json.dumps(measure()))
        return
    from hovle_train.ray_trainer import SPINS

    asleep, awake = [], []
    for _ in range(ROUNDS):
        asleep.append(child(0))
        awake.append(child(int(SPINS)))
        print(f"tokens/s asleep {asleep[-1]}, awake {awake[-1]}", flush=True)

    def median(rounds: list[dict[str, float]], name: str) -> float:
        return statistics.median(one[name] for one in rounds)

    result = {
        "benchmark": "cpu_steps",
        "ratio_padded": round(median(awake, "padded") / median(awake, "new"), 2),
        "ratio_awake": round(median(awake, "padded") / median(asleep, "padded"), 2),
        "ratio_both": round(median(awake, "padded") / median(asleep, "new"), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
