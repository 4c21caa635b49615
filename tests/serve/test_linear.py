"""Linear layers of a decode step: the same products, whatever the number of rows."""

import pytest
import torch
from torch import nn

from hovle_serve.engine import Engine
from hovle_serve.linear import FEWEST_ROWS, MOST_ROWS, FewRowsLinear, use_few_rows_linear, use_plain_linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, FEWEST_ROWS - 1, FEWEST_ROWS, MOST_ROWS, MOST_ROWS + 1])
def test_it_is_nn_linear(bias, dtype, rows):
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 24, bias=bias, dtype=dtype), torch.randn(rows, 1, 40, dtype=dtype)
    expected = linear(x)
    holder = nn.Sequential(linear)
    use_few_rows_linear(holder)
    assert type(linear) is FewRowsLinear
    out = linear(x)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    use_plain_linear(holder)
    assert type(linear) is nn.Linear


def test_a_gradient_is_the_same():
    linear, x = nn.Linear(40, 24), torch.randn(FEWEST_ROWS, 40)
    linear(x).square().sum().backward()
    expected = linear.weight.grad.clone()
    linear.weight.grad = None
    use_few_rows_linear(linear)
    linear(x).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, expected)


def test_the_engine_uses_it(model, processor):
    with Engine(model, processor):
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {FewRowsLinear}
