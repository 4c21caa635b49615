"""How ranks share one step: every rank with all weights (`ddp`), or each with a share of them (`fsdp2`).

Losses are divided by global target counts before backward, so the sum over ranks is the gradient of the whole batch,
whatever each rank's share. Ranks may have no sample in a step, or no picture; DDP's bookkeeping does not allow for
that, so gradients of `ddp` are summed by one all-reduce after backward. FSDP2's collectives run in every forward and
backward; there ranks short of micro-batches take part with empty ones.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from hovle_data.packing import PackedBatch
from hovle_train.recipe_sections import ParallelConfig
from hovle_train.runtime import Runtime
from hovle_train.sharded import whole
from hovle_train.stages.base import Stage
from hovle_train.weights import Weights

BUCKET_ELEMENTS = 2**24


class Parallel(ABC):
    """A frozen and float32 `module` made ready to train with others; `weights` are what an optimizer updates."""

    weights: Weights

    @abstractmethod
    def shares(self, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch | None]:
        """A step's micro-batches as this rank must run them; None is a round that only others have work in."""

    @abstractmethod
    def backward(self, batch: PackedBatch | None, totals: dict[str, float]) -> dict[str, Tensor]:
        """Loss and gradients of one micro-batch; returns what the stage logs."""

    @abstractmethod
    def sync(self) -> None:
        """After the last micro-batch: gradients are those of the whole step."""

    @abstractmethod
    def finish(self) -> nn.Module:
        """The module with whole float32 weights, for export. All ranks call it, and rank 0 may use the result."""


class Replicated(Parallel):
    """All weights on every rank."""

    def __init__(self, module: nn.Module, stage: Stage, runtime: Runtime, dtype: torch.dtype):
        self.module, self.stage, self.runtime = module.to(runtime.device), stage, runtime
        self.weights = Weights(module, dtype)

    def shares(self, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch | None]:
        return list(micro_batches)

    def backward(self, batch: PackedBatch | None, totals: dict[str, float]) -> dict[str, Tensor]:
        assert batch is not None
        loss, logged = self.stage.loss(self.module, batch, totals)
        loss.backward()
        self.weights.collect()
        return logged

    def sync(self) -> None:
        sync_gradients(self.weights, self.runtime.world_size)

    def finish(self) -> nn.Module:
        self.weights.restore(self.module)
        return self.module


class Objective(nn.Module):
    """A stage's loss as the forward of a module: FSDP gathers weights in hooks around forwards, and a loss may read
    any of them."""

    def __init__(self, module: nn.Module, stage: Stage):
        super().__init__()
        self.module, self.stage = module, stage

    def forward(self, batch: PackedBatch, totals: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.stage.loss(self.module, batch, totals)


class Sharded(Parallel):
    """FSDP2: transformer layers one by one, everything else as one group. Weights are kept in float32, computed with
    in `dtype`; layers without a gradient-checkpointing transformers layer are in the group of everything else.

    Raises ValueError where torch's FSDP2 is too old for ranks that use different weights in a step.
    """

    def __init__(
        self,
        module: nn.Module,
        stage: Stage,
        runtime: Runtime,
        dtype: torch.dtype,
        reshard_after_forward: bool,
        reduce_dtype: torch.dtype,
    ):
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ValueError(
                f"parallel.strategy fsdp2 needs FSDPModule.set_reduce_scatter_unused_params, which torch "
                f"{torch.__version__} lacks: install torch 2.14 or newer, or set strategy: ddp"
            )
        self.runtime, self.stage = runtime, stage
        meta = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
        self._skeleton = copy.deepcopy(module, meta)  # everything but the weights, for export
        self._objective = Objective(module, stage)
        self._own_group = not dist.is_initialized()  # --local: one process, and the same code
        if self._own_group:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(store=store, rank=0, world_size=1)
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(runtime.device.type, (runtime.world_size,)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=reduce_dtype
            ),
        }
        for layer in layers_of(module):
            fully_shard(layer, reshard_after_forward=reshard_after_forward, **settings)
        root = fully_shard(self._objective, reshard_after_forward=False, **settings)
        for shard in (m for m in self._objective.modules() if isinstance(m, FSDPModule)):
            shard.set_gradient_divide_factor(1.0)  # sums, not means,
            shard.set_force_sum_reduction_for_comms(True)  # by an operation that gloo has
        root.set_reduce_scatter_unused_params(True)
        self.weights = Weights(module, torch.float32)

    def shares(self, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch | None]:
        ranks = range(self.runtime.world_size)
        counts = self.runtime.sum({str(r): len(micro_batches) * (r == self.runtime.rank) for r in ranks})
        missing = int(max(counts.values())) - len(micro_batches)
        return [*micro_batches, *[None] * missing]

    def backward(self, batch: PackedBatch | None, totals: dict[str, float]) -> dict[str, Tensor]:
        if batch is None:
            loss, logged = self._objective(self._nothing(), totals)
            (loss * 0).backward()
            return dict.fromkeys(logged, torch.zeros(()))
        loss, logged = self._objective(batch, totals)
        loss.backward()
        return logged

    def _nothing(self) -> PackedBatch:
        """Two tokens of text without a target: the smallest batch that runs through every layer."""
        processor = self.stage.processor
        token = next(i for i in range(2) if i != processor.image_token_id)
        ids = torch.full((1, 2), token, device=self.runtime.device)
        positions = torch.arange(2, device=self.runtime.device)[None]
        return PackedBatch(ids, positions, torch.full_like(ids, -100), None, [2], ["nothing"], [], 0)

    def sync(self) -> None:
        return None  # done in backward

    def finish(self) -> nn.Module:
        weights = {}
        for name, parameter in self._objective.module.named_parameters():
            tensor = whole(parameter.detach())  # every rank takes part in gathering it
            if self.runtime.is_main:
                weights[name] = nn.Parameter(tensor.cpu(), parameter.requires_grad)
        if self._own_group:
            dist.destroy_process_group()
        named = dict(self._skeleton.named_parameters())
        return copy.deepcopy(self._skeleton, {id(named[name]): p for name, p in weights.items()})


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The transformer layers of a model, ours and every transformers LLM's."""
    return [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]


def compile_layers(module: nn.Module) -> None:
    """torch.compile for norms and MLPs of the transformer layers.

    Not for attention: packed rows differ from step to step in ways that would compile it anew each time. Nor for the
    layer, whose calls FSDP's hooks surround.
    """
    for layer in layers_of(module):
        for name, child in layer.named_children():
            if not name.endswith(("attn", "attention")):
                child.compile(dynamic=True)


def make_parallel(
    config: ParallelConfig, module: nn.Module, stage: Stage, runtime: Runtime, dtype: torch.dtype
) -> Parallel:
    """A recipe's `parallel` section over a built and frozen module on the CPU, which moves to the rank's device."""
    if config.compile:
        compile_layers(module)
    if config.strategy == "ddp":
        return Replicated(module, stage, runtime, dtype)
    reduce_dtype = getattr(torch, config.reduce_dtype)
    return Sharded(module, stage, runtime, dtype, config.reshard_after_forward, reduce_dtype)


def sync_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Sum gradients over ranks, in buckets; a parameter without a gradient counts as zero, on one rank, too."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if world_size == 1:
            continue
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
