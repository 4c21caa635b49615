"""An exponential moving average of the weights: kept beside them, in every checkpoint, and exported where asked."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hovle_train.sharded import whole

KIND = "average"


class WeightAverage(torch.optim.Optimizer):
    """Averages of parameters, as an optimizer that moves none of them: checkpoints and sharding treat it as one.

    In the first steps the average forgets faster, by min(decay, (1 + step) / (10 + step)): else it would be the weights
    that a run began with for a good part of a short run.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        super().__init__(list(parameters.values()), {})
        self.decay, self._named = decay, dict(parameters)
        for p in parameters.values():
            self.state[p][KIND] = p.detach().clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- d · average + (1 - d) · weights, behind the update of 0-based `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for p in self._named.values():
            self.state[p][KIND].lerp_(p.detach(), 1 - decay)

    def gather(self) -> dict[str, Tensor]:
        """The whole averages by parameter name, on the CPU. All ranks call it."""
        return {name: whole(self.state[p][KIND]).cpu() for name, p in self._named.items()}


@torch.no_grad()
def write_averages(averages: Mapping[str, Tensor], module: nn.Module) -> None:
    """Give a module of the same parameter names the averages in place of its weights."""
    own = dict(module.named_parameters())
    for name, average in averages.items():
        own[name].copy_(average)
