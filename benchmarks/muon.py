"""Muon on the matrices of eight small transformer blocks: ours, batched, against torch.optim.Muon, in one process."""

import json
import time

import torch
from torch import nn

from hovle_train.muon import BatchedMuon

SHAPES = [(256, 256)] * 4 + [(704, 256)] * 2 + [(256, 704)]
BLOCKS, REPEATS = 8, 15


def parameters() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape)) for shape in SHAPES * BLOCKS]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def main() -> None:
    ours = BatchedMuon(parameters(), lr=1e-3)
    theirs = torch.optim.Muon(parameters(), lr=1e-3, adjust_lr_fn="match_rms_adamw")
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(REPEATS):  # by turns, so that a noisy machine is noisy for both
        for name, optimizer in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    median = {name: sorted(times)[REPEATS // 2] for name, times in seconds.items()}
    print(
        f"median of {REPEATS} steps over {len(SHAPES) * BLOCKS} matrices: {median}, {torch.get_num_threads()} threads"
    )
    print(json.dumps({"benchmark": "muon", "ratio_torch": round(median["theirs"] / median["ours"], 2)}))


if __name__ == "__main__":
    main()
