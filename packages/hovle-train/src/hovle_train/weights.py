"""What an optimizer updates: a module's trainable parameters, or float32 masters of a module that computes lower.

A bfloat16 weight cannot take a step of a thousandth of itself; its float32 master can. Everything frozen is cast, which
halves its memory; what the cast rounds is kept aside on the CPU, since a frozen weight leaves training as it came.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hovle_train.linear import use_contiguous_gradients, use_plain_gradients


class Weights:
    """Trainable weights of a module by name, in float32, with the module computing in `dtype`.

    For float32 the masters are the module's own parameters and `collect` and `publish` have nothing to do.
    Buffers keep their type: rotary frequencies need it.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self._own = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if dtype == torch.float32:
            self.masters = self._own
            return
        self.masters = {name: nn.Parameter(p.detach().clone()) for name, p in self._own.items()}
        self._rounded: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            original, parameter.data = parameter.data, parameter.data.to(dtype)
            if name not in self._own and not torch.equal(parameter.data.to(original.dtype), original):
                self._rounded[name] = original.cpu()
        use_contiguous_gradients(module)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.masters.values())

    def collect(self) -> None:
        """Add the gradients of a micro-batch to the masters' and clear them."""
        if self.dtype == torch.float32:
            return
        for name, parameter in self._own.items():
            if parameter.grad is None:
                continue
            master = self.masters[name]
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the module, after a step or a load."""
        if self.dtype == torch.float32:
            return
        for name, parameter in self._own.items():
            parameter.copy_(self.masters[name])

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Give the module its weights in float32, for export: the masters, and what is frozen bit for bit."""
        if self.dtype == torch.float32:
            return
        use_plain_gradients(module)
        for name, parameter in module.named_parameters():
            exact = self._rounded.get(name)
            parameter.data = parameter.data.float() if exact is None else exact.to(parameter.device)
        for name, parameter in self._own.items():
            parameter.copy_(self.masters[name])
