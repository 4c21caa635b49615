"""MFU: the share of a device's peak that a run's arithmetic reaches (PaLM, Chowdhery et al. 2022, appendix B).

The arithmetic of the first step of a start is counted by torch, operation by operation: what is frozen, cached or
skipped is not guessed at. What activation checkpointing computes twice counts twice.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# FLOP/s of dense bfloat16 (float16 where there is none), from the vendors' data sheets; the first name that occurs in
# the device's is taken.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12,
    "A6000": 155e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12, "MI300X": 1307e12,
    "MI250X": 383e12,
}  # fmt: skip


# A first line of metrics waits for what is measured, and a CPU without bfloat16 takes long for one matmul of a side
# that a fast one needs to show what it can do.
ENOUGH_SECONDS = 0.1


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Sequence[int]) -> int:
    """Two matmuls for each query head; keys and values may have fewer."""
    batch, heads, num_queries, head_dim = query
    return 2 * batch * heads * num_queries * key[-2] * (head_dim + value[-1])


def _attention_backward(grad: Sequence[int], *shapes: Sequence[int]) -> int:
    """Four matmuls, and the scores once more."""
    return _attention(*shapes) * 5 // 2


# torch's own formulas know neither the attention that CPUs run nor keys with fewer heads than queries.
_ATTENTION: dict[Any, Any] = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{direction}"): formula
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    for direction, formula in (("", _attention), ("_backward", _attention_backward))
}


class _Counter(TorchDispatchMode):
    """Sums up torch's formulas over the operations that run. Unlike torch's FlopCounterMode it takes none of them
    apart, so that a counted step has the very bits of one that was not; but what is compiled runs as it would without.
    """

    supports_higher_order_operators = True  # flex attention runs as it would; it is not counted

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "overloadpacket", None)
        if formula := _ATTENTION.get(packet):
            self.flops += formula(*(arg.shape for arg in args if isinstance(arg, torch.Tensor)))
        elif formula := flop_registry.get(packet):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


class Speed:
    """What one worker computes for a token, and the most that its device could."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.flops_per_token: float | None = None
        self._peak: float | None = None

    @contextmanager
    def count_once(self, num_tokens: int) -> Iterator[None]:
        """Count the operations of the body, which trains on so many tokens; of the first body only."""
        if self.flops_per_token is not None or not num_tokens:
            yield
            return
        with _Counter() as counter:
            yield
        self.flops_per_token = counter.flops / num_tokens

    def mfu(self, tokens_per_s: float, world_size: int) -> dict[str, float]:
        """{"mfu": share of the peak}, of all ranks at `tokens_per_s` together; {} before a step was counted."""
        if not self.flops_per_token:
            return {}
        if self._peak is None:
            self._peak = peak_flops(self.device, self.dtype)
        return {"mfu": self.flops_per_token * tokens_per_s / (self._peak * world_size)}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a device reaches at most: known for GPUs in half precision, measured by a matmul for all others."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAKS.items() if part in name), None)
        if known is not None:
            return known
    most, spent = 0.0, 0.0
    for side in (8192,) if device.type == "cuda" else (256, 512, 1024):
        if spent > ENOUGH_SECONDS:
            break
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        seconds = [_time_matmul(matrix) for _ in range(5)]
        most, spent = max(most, 2 * side**3 / min(seconds)), spent + sum(seconds)
    return most


@torch.no_grad()
def _time_matmul(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    product = matrix @ matrix
    product[0, 0].item()  # waits for the device
    return time.perf_counter() - started
