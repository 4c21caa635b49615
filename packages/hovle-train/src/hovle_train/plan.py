"""What a recipe would take: parameters, memory a GPU, operations, tokens and hours. Nothing is loaded or trained."""

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from hovle_core.config import HovleConfig
from hovle_core.hub import local_folder
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.official import is_released, read_released_config
from hovle_core.plugins import HovlePlugins
from hovle_core.registry import Registry
from hovle_train.build import build_backbone, embedding_config, find_hovle
from hovle_train.config import Recipe
from hovle_train.cost import Cost, Row, measure, row_cost
from hovle_train.freeze import freeze_except
from hovle_train.optim import is_block_matrix
from hovle_train.runs import is_finished, resolve_checkpoint
from hovle_train.stages.base import Stage
from hovle_train.stages.distillation import Distillation
from hovle_train.wrappers import wrap_model

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB, and dense bfloat16 operations a second as the vendor states them."""

    memory: float
    peak: float


GPUS = {
    "V100": Gpu(32, 125e12),
    "A100-40G": Gpu(40, 312e12),
    "A100": Gpu(80, 312e12),
    "L40S": Gpu(48, 362e12),
    "RTX4090": Gpu(24, 165e12),
    "H100": Gpu(80, 989e12),
    "H200": Gpu(141, 989e12),
    "B200": Gpu(180, 2250e12),
}


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say: its data's shape, and how much of the peak a step gets."""

    tiles: float
    text_tokens: float
    target_share: float
    mfu: float


@dataclass(frozen=True)
class StagePlan:
    """`memory`: bytes a GPU, by kind. `operations`: of a step, over all GPUs."""

    stage: str
    parameters: int
    trainable: int
    steps: int
    tokens_per_step: int
    operations: float
    hours: float
    memory: dict[str, float]
    fits: bool

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


def parse_gpus(text: str) -> tuple[int, str]:
    """`8xH100` or `4x8xH100` -> number and kind. Raises ValueError for an unknown kind, listing those known."""
    *counts, kind = text.split("x")
    if kind not in GPUS or not all(re.fullmatch("[1-9][0-9]*", count) for count in counts):
        raise ValueError(f"--gpus {text!r} must read 8xH100 or 4x8xH100 (known: {', '.join(GPUS)})")
    return math.prod(map(int, counts)), kind


def plan_stage(
    recipe: Recipe,
    plugins: HovlePlugins,
    gpus: str,
    assumptions: Assumptions,
    others: Sequence[Recipe] = (),
    sharded: bool = False,
) -> StagePlan:
    """Plan one stage. `others` are recipes whose runs it may start from before they have run; `sharded`: each GPU has
    a share of weights, gradients and optimizer (FSDP2).

    Raises ValueError for samples that fit no row, for a model whose size nothing says yet, for an architecture that
    cannot be counted, and for wrappers that need its weights.
    """
    count, kind = parse_gpus(gpus)
    gpu, registry = GPUS[kind], plugins.registry
    stage: Stage = registry.build(
        "stage", recipe.stage.name, recipe=_unloaded(recipe, registry), registry=registry
    )
    module = meta_module(stage, plugins, others)
    dtype = torch.float32 if recipe.train.precision == "float32" else torch.bfloat16
    row, tokens_per_step = _batch(recipe, module, assumptions, count)
    cost = _counted(module, row, dtype, recipe.model.activation_checkpointing)
    operations = cost.operations * tokens_per_step / row.tokens
    memory = _states(recipe, module, dtype, count if sharded else 1) | {
        "activations": cost.saved + cost.transient
    }
    if isinstance(stage, Distillation) and recipe.resources.teacher_pool is None:  # else it is on other GPUs
        teacher = stage.features.teacher
        memory["weights"] += sum(p.numel() * 4 for p in teacher.parameters())
        if not stage.options.cache_features and row.tiles:
            side = stage.recipe.model.embedding.get("image_size", 448)
            tile = torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta")
            operations += (
                measure(lambda: teacher.features(tile), teacher).forward
                * row.tiles
                * tokens_per_step
                / row.tokens
            )
    seconds = recipe.train.steps * operations / (count * gpu.peak * assumptions.mfu)
    return StagePlan(
        recipe.stage.name, sum(p.numel() for p in module.parameters()),
        sum(p.numel() for p in module.parameters() if p.requires_grad), recipe.train.steps,
        tokens_per_step, operations, seconds / 3600, memory, sum(memory.values()) < gpu.memory * GIB,
    )  # fmt: skip


def _counted(module: nn.Module, row: Row, dtype: torch.dtype, checkpointing: bool) -> Cost:
    """`row_cost`. Raises ValueError naming a model that is laid out otherwise, or whose operations need contents."""
    try:
        return row_cost(module, row, dtype, checkpointing)
    except (AttributeError, TypeError, RuntimeError) as error:
        config = getattr(module, "config", None) or find_hovle(module).config
        kind = (getattr(config, "text_config", None) or config).model_type
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot count {kind}: a plan runs a layer of a Llama-like LLM on tensors without contents, and this one "
            f"says {type(error).__name__}: {reason}"
        ) from error


def meta_module(stage: Stage, plugins: HovlePlugins, others: Sequence[Recipe] = ()) -> nn.Module:
    """What the stage trains, without contents, frozen where it says, with its wrappers, and in train mode."""
    recipe = stage.recipe
    with torch.device("meta"):
        if "model.init_from" not in stage.reads:  # a bare LLM
            module: nn.Module = AutoModelForCausalLM.from_config(
                build_backbone(recipe.model, stage.registry).config()
            )
        else:
            config = hovle_config(recipe, stage.registry, others)
            module = stage.wrap(HovleForConditionalGeneration(config))
        freeze_except(module, stage.trainable(module))
        try:
            return wrap_model(plugins, module, recipe.model.wrappers)
        except (NotImplementedError, RuntimeError) as error:  # what torch raises where contents are asked for
            raise ValueError(
                f"model.wrappers {', '.join(recipe.model.wrappers)}: made for a model with weights, and a plan has "
                f"shapes alone ({error}); plan without them: --set 'model.wrappers={{}}'"
            ) from error


def hovle_config(recipe: Recipe, registry: Registry, others: Sequence[Recipe]) -> HovleConfig:
    """The config of the model that a recipe starts from: a checkpoint's, a new one's, or that of the run before it."""
    start = recipe.model.init_from
    if start is None:
        llm = build_backbone(recipe.model, registry).config()
        return HovleConfig(
            text_config=llm, embedding_config=embedding_config(recipe.model, llm, llm.vocab_size)
        )
    for other in others:
        if not is_finished(start) and Path(other.run_dir) == Path(start) != Path(recipe.run_dir):
            return hovle_config(other, registry, others)
    try:
        folder = local_folder(resolve_checkpoint(start), weights=False)
    except FileNotFoundError as error:
        raise ValueError(
            f"model.init_from {start} is not there yet, and no recipe beside this one has it as run_dir: {error}"
        ) from error
    if is_released(folder):
        return read_released_config(folder)
    config: HovleConfig = HovleConfig.from_pretrained(str(folder))
    return config


def _unloaded(recipe: Recipe, registry: Registry) -> Recipe:
    """The recipe with teachers of random weights, where their classes have such an argument: a plan loads nothing."""
    copy = recipe.model_copy(deep=True)
    options = copy.stage.options
    for teacher in [options.get("teacher"), *(options.get("teachers") or [])]:
        if not isinstance(teacher, dict):
            continue
        if "weights" in inspect.signature(registry.get("teacher", teacher["name"]).load()).parameters:
            teacher["options"] = {**teacher.get("options", {}), "weights": None}
    return copy


def _batch(recipe: Recipe, module: nn.Module, assumptions: Assumptions, gpus: int) -> tuple[Row, int]:
    """A row of one GPU, and the tokens of a step over all."""
    train = recipe.train
    hovle = next((m for m in module.modules() if isinstance(m, HovleForConditionalGeneration)), None)
    tiles = 0.0 if hovle is None else assumptions.tiles
    per_tile = 0 if hovle is None else hovle.config.embedding_config.tokens_per_tile
    sample = tiles * per_tile + assumptions.text_tokens
    if sample > train.micro_batch_tokens:
        raise ValueError(
            f"a sample of {tiles:g} tiles of {per_tile} tokens and {assumptions.text_tokens:g} text tokens is longer "
            f"than train.micro_batch_tokens {train.micro_batch_tokens}: raise it, or lower --tiles or --text-tokens"
        )
    if train.global_batch_rows is not None:
        step = float(train.global_batch_rows * train.micro_batch_tokens)
    else:
        assert train.global_batch_size is not None
        step = train.global_batch_size * sample
    tokens = min(train.micro_batch_tokens, math.ceil(step / gpus))
    if tiles:
        tokens = min(tokens, int(train.micro_batch_tiles / tiles * sample))
    tokens = max(tokens, math.ceil(sample))
    samples = tokens / sample
    targets = max(1, round(samples * assumptions.text_tokens * assumptions.target_share))
    return Row(tokens, math.ceil(sample), round(samples * tiles), targets), round(step)


def _states(recipe: Recipe, module: nn.Module, dtype: torch.dtype, shares: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer on one GPU, which has one of so many shares of them."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total, learnt = sum(p.numel() for p in module.parameters()), sum(p.numel() for p in trainable.values())
    low = dtype != torch.float32
    muon = recipe.optim.name == "muon"
    state = sum(p.numel() * (4 if muon and is_block_matrix(name, p) else 8) for name, p in trainable.items())
    state += 4 * learnt if recipe.optim.ema is not None else 0
    if shares > 1:
        # Gathered while they compute: what is in no layer all the time, and a layer with the next one.
        layers = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        gathered = (total - sum(sizes) + 2 * max(sizes)) * (2 if low else 4)
        unreduced = sum(p.numel() for p in trainable.values()) - sum(
            p.numel() for layer in layers for p in layer.parameters() if p.requires_grad
        )
        return {
            "weights": 4 * total / shares + gathered,
            "gradients": 4 * learnt / shares + unreduced * (2 if low else 4),
            "optimizer": state / shares,
        }
    # Computed in bfloat16, updated in float32; a micro-batch's gradients are in bfloat16 before they are added up.
    weights = 2 * total + 4 * learnt if low else 4 * total
    gradients = 4 * learnt + (2 * learnt if low else 0)
    return {"weights": weights, "gradients": gradients, "optimizer": state}
