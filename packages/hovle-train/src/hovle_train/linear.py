"""Linear layers whose weights' gradients are fast in bfloat16 on CPUs.

The gradient of a weight is a product whose first matrix autograd passes transposed, as a view. oneDNN's bfloat16
kernels take about twice as long for such a view as for its copy, so the copy pays for itself; the sums are as
near to the exact ones, and at most shapes the same bits. `Weights` does this for every bfloat16 run
(benchmarks/train_step.py).

Shapes: n tokens in all, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_WEIGHT = 2**20  # elements; below, the copy costs as much as it saves


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, grad.flatten(0, -2).t().contiguous() @ x.flatten(0, -2)  # [O, n] @ [n, I]


class ContiguousLinear(nn.Linear):
    """nn.Linear, `[..., I] -> [..., O]`, with contiguous matrices in the gradient of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad and input.dtype == self.weight.dtype:
            return _Linear.apply(input, self.weight)
        return super().forward(input)


def use_contiguous_gradients(module: nn.Module) -> None:
    """Turn the large bfloat16 linear layers on CPUs within `module` into ContiguousLinear; their parameters stay."""
    for linear in module.modules():
        if type(linear) is not nn.Linear or linear.bias is not None:
            continue
        weight = linear.weight
        if (
            weight.device.type == "cpu"
            and weight.dtype == torch.bfloat16
            and weight.numel() >= SMALLEST_WEIGHT
        ):
            linear.__class__ = ContiguousLinear


def use_plain_gradients(module: nn.Module) -> None:
    """Undo use_contiguous_gradients."""
    linears: list[nn.Linear] = [m for m in module.modules() if type(m) is ContiguousLinear]
    for linear in linears:
        linear.__class__ = nn.Linear
