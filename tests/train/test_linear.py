"""Contiguous products in the gradients of bfloat16 weights: as exact, and only where they are wanted."""

import pytest
import torch
from torch import nn

from hovle_train.linear import ContiguousLinear, use_contiguous_gradients, use_plain_gradients
from hovle_train.weights import Weights

WIDE = 1024


def layer(outputs=WIDE, **options):
    torch.manual_seed(0)
    return nn.Linear(WIDE, outputs, **{"bias": False, "dtype": torch.bfloat16} | options)


@pytest.mark.parametrize("tokens", [(1, 1), (2, 37), (300,)])
@pytest.mark.parametrize("outputs", [WIDE, 1051])
def test_gradients_are_as_near(tokens, outputs):
    linear = layer(outputs)
    x, grad = (torch.randn(*tokens, n).to(torch.bfloat16) for n in (WIDE, outputs))
    made = []
    for _ in range(2):
        inputs, linear.weight.grad = x.clone().requires_grad_(), None
        out = linear(inputs)
        out.backward(grad)
        made.append((out, linear.weight.grad, inputs.grad))
        use_contiguous_gradients(linear)
    assert type(linear) is ContiguousLinear
    (out, plain, grad_x), (same_out, contiguous, same_grad_x) = made
    assert torch.equal(out, same_out)
    assert torch.equal(grad_x, same_grad_x)
    # Other kernels sum in another order: which entries round the other way depends on shape, threads and CPU.
    assert (plain != contiguous).double().mean() < 1e-3
    exact = grad.flatten(0, -2).double().t() @ x.flatten(0, -2).double()
    off = [float((found.double() - exact).norm()) for found in (plain, contiguous)]
    assert off[1] <= 1.001 * off[0]


def test_small_ones_those_with_a_bias_and_float32_stay():
    others = nn.ModuleList([layer(8), layer(bias=True), layer(dtype=torch.float32), nn.Embedding(4, WIDE)])
    use_contiguous_gradients(others)
    assert [type(module) for module in others] == [nn.Linear, nn.Linear, nn.Linear, nn.Embedding]


def test_a_frozen_layer_gives_its_inputs_gradient_alone():
    linear = layer().requires_grad_(False)
    use_contiguous_gradients(linear)
    x = torch.randn(3, WIDE, dtype=torch.bfloat16, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is None


def test_bfloat16_weights_use_them_and_leave_none_behind():
    net = nn.Sequential(layer(dtype=torch.float32))
    parameter = net[0].weight
    weights = Weights(net, torch.bfloat16)
    assert type(net[0]) is ContiguousLinear
    assert net[0].weight is parameter
    weights.restore(net)
    assert type(net[0]) is nn.Linear
    use_plain_gradients(net)
