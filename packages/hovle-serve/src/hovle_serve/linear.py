"""Linear layers that are fast on CPUs for the few rows of a decode step.

`F.linear` passes the weight transposed, as a view, and MKL and oneDNN are slow at that where there are few rows: the
same product with the weight first, whose result is then small enough to turn around, takes two thirds of the time
(benchmarks/decode_step.py). One row is a matrix-vector product, which is fast; at many the order does not matter.

Shapes: n rows in all, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn

FEWEST_ROWS, MOST_ROWS = 12, 48


class FewRowsLinear(nn.Linear):
    """nn.Linear, `[..., I] -> [..., O]`, computed as `(weight @ x.T).T` for few rows."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.shape[:-1].numel()
        if not FEWEST_ROWS <= rows <= MOST_ROWS or input.dtype != self.weight.dtype:
            return super().forward(input)
        columns = input.reshape(rows, -1).t()
        if self.bias is None:
            out = torch.mm(self.weight, columns)  # [O, I] @ [I, n]
        else:
            out = torch.addmm(self.bias.unsqueeze(1), self.weight, columns)
        return out.t().contiguous().view(*input.shape[:-1], -1)


def use_few_rows_linear(module: nn.Module) -> None:
    """Turn the linear layers on CPUs within `module` into FewRowsLinear; their parameters stay."""
    for linear in module.modules():
        if type(linear) is nn.Linear and linear.weight.device.type == "cpu":
            linear.__class__ = FewRowsLinear


def use_plain_linear(module: nn.Module) -> None:
    """Undo use_few_rows_linear."""
    linears: list[nn.Linear] = [m for m in module.modules() if type(m) is FewRowsLinear]
    for linear in linears:
        linear.__class__ = nn.Linear
