"""Muon (Jordan et al. 2024) with the Newton-Schulz iterations of like matrices in one batched product.

torch.optim.Muon goes matrix by matrix, which at a transformer's few distinct shapes leaves the cores waiting;
benchmarks/muon.py measures both. The update rule is torch's, with `adjust_lr_fn="match_rms_adamw"` and Nesterov
momentum, and a test holds the two together.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hovle_core.precision import has_fast_bfloat16
from hovle_train.sharded import as_share_of, local, share_like, whole

# Quintic Newton-Schulz coefficients of the original.
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
EPSILON = 1e-7


def orthogonalize(updates: Tensor) -> Tensor:
    """`[K, m, n]` -> nearest semi-orthogonal matrices, approximately, in bfloat16, or in float32 where that is faster:
    CPUs without AMX compute bfloat16 products a hundred times slower."""
    wide = updates.shape[-2] > updates.shape[-1]
    x = updates.to(torch.bfloat16 if has_fast_bfloat16(updates.device) else torch.float32)
    x = x.mT if wide else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if wide else x


class BatchedMuon(torch.optim.Optimizer):
    """Momentum, orthogonalised, at the size of AdamW's updates; decoupled weight decay.

    Args:
        params: matrices only. lr: shared with AdamW by the scale 0.2 · sqrt(max(m, n)) (Moonlight).

    Raises ValueError for a parameter that is not a matrix.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon takes matrices only, got a parameter of shape {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(p.shape), []).append(p)
            for shape, members in by_shape.items():
                self._step_alike(members, group, 0.2 * math.sqrt(max(shape)))

    def _step_alike(self, members: list[Tensor], group: dict[str, Any], scale: float) -> None:
        for p in members:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights = [local(p) for p in members]
        grads = [local(p.grad) for p in members if p.grad is not None]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in members]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"])
        # A direction depends on the whole matrix: sharded ones are gathered, and every rank computes all of them.
        whole_updates = torch.stack([whole(as_share_of(p, u)) for p, u in zip(members, updates, strict=True)])
        directions = orthogonalize(whole_updates).to(members[0].dtype).unbind(0)
        steps = [local(share_like(p, d)) for p, d in zip(members, directions, strict=True)]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, steps, alpha=-group["lr"] * scale)
