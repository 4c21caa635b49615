"""Drop path (stochastic depth): in training, residual branches of the embedding blocks are left out sample by sample.

The rate grows with depth, as usual, and may grow over the run, as in De-focus Attention Networks (0.1 -> 0.7). It is a
function of step and depth, and what is drawn comes from the step's own seed: a resumed run drops what it would have.

Shapes: T packed tokens, n samples in the row, D hidden size.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hovle_core.layers import TransformerBlock
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_train.recipe_sections import DropPathConfig


def drop_rate(config: DropPathConfig, step: int, steps: int, block: int, num_blocks: int) -> float:
    """The rate of 0-based `block` in 0-based `step`; the last block has all of the step's rate."""
    rate = config.rate
    if config.start_rate is not None:
        rate = config.start_rate + (config.rate - config.start_rate) * step / max(1, steps - 1)
    return rate * block / (num_blocks - 1) if config.depth == "linear" and num_blocks > 1 else rate


class DropPath:
    """Hooks on the embedding blocks of a HoVLE that scale what each branch adds by 0 or 1 / (1 - rate).

    Both branches of a block draw for themselves, once a forward: recomputed activations drop what was dropped.
    """

    def __init__(self, model: HovleForConditionalGeneration, config: DropPathConfig, steps: int):
        self.config, self.steps = config, steps
        self.blocks = list(cast(Iterable[TransformerBlock], model.embedding.layers))
        self.rates = [0.0] * len(self.blocks)
        self._kept: dict[nn.Module, Tensor] = {}  # branch -> what its output is multiplied by, [1, T, 1]
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(self._draw(i), with_kwargs=True)
            for branch in (block.self_attn, block.mlp):
                # A function, and no bound method: a copy of the model takes that as it is, and not a copy of this
                # object with what was kept for other rows.
                branch.register_forward_hook(lambda *given: self._scale(*given))

    def set_step(self, step: int) -> None:
        """The rates of `step`, before its first forward."""
        num = len(self.blocks)
        self.rates = [drop_rate(self.config, step, self.steps, i, num) for i in range(num)]

    def _draw(self, i: int) -> Any:
        def draw(block: TransformerBlock, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            branches = (block.self_attn, block.mlp)
            if not block.training or self.rates[i] == 0:
                for branch in branches:
                    self._kept.pop(branch, None)
                return
            sample = (kwargs["position_ids"] == 0).long().cumsum(
                -1
            ) - 1  # [1, T]: a sample's positions restart
            num = int(sample.max()) + 1
            for branch in branches:
                keep = torch.rand(num, device=sample.device) >= self.rates[i]
                scale = keep.to(args[0].dtype) / (1 - self.rates[i])
                self._kept[branch] = scale[sample].unsqueeze(-1)

        return draw

    def _scale(self, branch: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self._kept[branch] if branch in self._kept else output
