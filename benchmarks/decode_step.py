"""One decode step of N padded rows on a CPU: plain `nn.Linear` against the engine's FewRowsLinear.

Both take turns, step by step, on the same batch. The model and the prompts' lengths are those of benchmarks/serve.py,
in float32; a ratio is the median over the steps.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from serve import encoded, requests, write_models
from torch import nn

from hovle_core import HovleForConditionalGeneration
from hovle_core.processor import HovleProcessor
from hovle_serve.batch import DecodeBatch, Prefilled, Unread, prefill
from hovle_serve.linear import use_few_rows_linear, use_plain_linear

ROWS = (4, 8, 16, 32)
WARM_UP, STEPS = 3, 25


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        model = HovleForConditionalGeneration.from_pretrained(f"{folder}/hovle", dtype=torch.float32).eval()
        processor = HovleProcessor.from_pretrained(f"{folder}/hovle")
    unread = [Unread(encoded(processor, body)) for seed in (0, 1) for body in requests(seed, False)]
    with torch.inference_mode():
        prompts = [prefill(model, processor, [one])[0][0] for one in unread]
        ratios = {rows: round(faster(model, prompts[:rows]), 2) for rows in ROWS}
    print(json.dumps({"benchmark": "decode_step", "ratio": ratios, "threads": torch.get_num_threads()}))


def faster(model: HovleForConditionalGeneration, prompts: Sequence[Prefilled]) -> float:
    """A step's time with plain layers over that with the engine's."""
    batch = DecodeBatch(model)
    batch.join(prompts)
    ratios = []
    for _ in range(WARM_UP + STEPS):
        plain = step(batch, use_plain_linear)
        ratios.append(plain / step(batch, use_few_rows_linear))
    return statistics.median(ratios[WARM_UP:])


def step(batch: DecodeBatch, choose: Callable[[nn.Module], None]) -> float:
    choose(batch.model)
    start = time.perf_counter()
    batch.step([0] * len(batch))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
