"""Data parallelism: gradients summed over ranks. One file, so that sharding can take its place.

Losses are divided by global target counts before backward, so the sum over ranks is the gradient of the whole batch,
whatever each rank's share. Ranks may even have no sample in a step, or no picture, which a plain all-reduce allows
and DDP's bookkeeping does not.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

BUCKET_ELEMENTS = 2**24


def sync_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Sum gradients over ranks, in buckets; a parameter without a gradient on this rank counts as zero."""
    if world_size == 1:
        return
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter)
        size += parameter.numel()
        if size >= BUCKET_ELEMENTS:
            _all_reduce(bucket)
            bucket, size = [], 0
    if bucket:
        _all_reduce(bucket)


def _all_reduce(parameters: list[nn.Parameter]) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))
