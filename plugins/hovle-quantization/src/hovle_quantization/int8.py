"""Frozen linear layers in int8, and back.

Shapes: n tokens in all, I inputs, O outputs.
"""

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hovle_core.wrapping import model_within

LARGEST = 127


class _Int8Linear(torch.autograd.Function):
    """`x [..., I] -> [..., O]`. The weight is taken out of int8 on the way there and again on the way back, so that no
    layer keeps a copy of it for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (grad * scale.to(grad.dtype)) @ weight.to(grad.dtype), None, None


class Originals:
    """Weights as they came, in a temporary file that goes when nobody refers to it any more."""

    def __init__(self, weights: Mapping[str, Tensor]):
        folder = tempfile.TemporaryDirectory(prefix="hovle-quantization-")
        self.path = Path(folder.name) / "originals.safetensors"
        save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, self.path)
        self._remove = weakref.finalize(self, folder.cleanup)

    def __deepcopy__(self, memo: Any) -> "Originals":
        return self  # a copy of a model, such as an average's, reads the same file

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)


class Int8Linear(nn.Module):
    """A frozen nn.Linear, `[..., I] -> [..., O]`, whose weight is int8 `[O, I]` times a float32 `scale [O]`.

    Both are buffers: what casts, shards or optimizes parameters leaves them alone.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, originals: Originals, name: str):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._originals, self._name = originals, name
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        out = _Int8Linear.apply(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias

    def original(self) -> nn.Linear:
        """The layer as it came."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self._originals[self._name].to(self.weight.device)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)


def quantize(module: nn.Module, modules: Sequence[str] = ("language_model.",)) -> None:
    """Exchange the frozen linear layers of the model in `module` that lie under `modules` for int8 ones. Heads stay.

    Raises ValueError for a part that is none, and for one without a frozen linear layer.
    """
    model = model_within(module)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linears = {
        name: part for name, part in model.named_modules() if type(part) is nn.Linear and part is not head
    }
    found: dict[str, nn.Linear] = {}
    for under in modules:
        inside = {name: part for name, part in linears.items() if f".{under}" in f".{name}"}
        if not inside:
            raise ValueError(
                f"model.wrappers.quantization.modules {under!r} holds no linear layer; there are {list(linears)[:3]}"
            )
        frozen = {n: p for n, p in inside.items() if not any(q.requires_grad for q in p.parameters())}
        if not frozen:
            raise ValueError(
                f"model.wrappers.quantization.modules {under!r}: all of its linear layers train, and int8 is for what "
                "is frozen: leave the wrapper out of this stage, or train adapters there (model.wrappers.lora)"
            )
        found |= frozen
    originals = Originals({name: part.weight for name, part in found.items()})
    for name, linear in found.items():
        _exchange(model, name, Int8Linear(linear, originals, name))


def restore(module: nn.Module) -> None:
    """Put the linear layers back as they came."""
    model = model_within(module)
    quantized = {name: part for name, part in model.named_modules() if isinstance(part, Int8Linear)}
    for name, part in quantized.items():
        _exchange(model, name, part.original())


def _exchange(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, part)
