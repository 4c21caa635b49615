"""What a packed row costs: floating point operations, and bytes kept for the backward pass. Measured on torch's meta
device, where tensors have shapes and no contents: models of any size take seconds and next to no memory.

One layer of each stack is run and multiplied; attention is counted by the lengths of samples, as kernels that skip what
is masked compute it.

Shapes: T tokens of a row, E of them in the embedding blocks (more for HoVLE-HD), D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from hovle_core.config import ATTENTION
from hovle_core.losses import CHUNK_LOGITS, LARGEST_LOGITS, cosine_loss
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_train.build import find_hovle
from hovle_train.stages.distillation import DistillationModule

COUNTED_ATTENTION = "hovle_counted"
# Of the T² scores of a sample: half of them are hidden by causality.
CAUSAL_SHARE = 0.5


@dataclass(frozen=True)
class Row:
    """A packed row of `tokens` in samples of `sample` tokens, with so many tiles and target tokens."""

    tokens: int
    sample: int
    tiles: int
    targets: int


@dataclass(frozen=True)
class Cost:
    """Operations of forward and backward, bytes that live from one to the other, and the most that is there for a
    moment beside them."""

    forward: float = 0.0
    backward: float = 0.0
    saved: float = 0.0
    transient: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.saved + other.saved,
            max(self.transient, other.transient),
        )

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.forward * times, self.backward * times, self.saved * times, self.transient)

    @property
    def operations(self) -> float:
        return self.forward + self.backward


class _CountedAttention(torch.autograd.Function):
    """Attention's memory without its work: a fused kernel keeps q, k, v, its output and a number a head and token."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2))
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _register() -> None:
    AttentionInterface.register(
        COUNTED_ATTENTION, lambda module, q, k, v, mask, **kwargs: (_CountedAttention.apply(q, k, v), None)
    )
    AttentionMaskInterface.register(COUNTED_ATTENTION, lambda *args, **kwargs: None)


def measure(work: Callable[[], Tensor], module: nn.Module, shared: Sequence[Tensor] = ()) -> Cost:
    """Operations of `work` and of its backward, and the bytes that it keeps besides `module`'s parameters and what is
    `shared` with other work."""
    others = {t.untyped_storage()._cdata for t in (*module.parameters(), *shared)}
    kept: dict[int, Tensor] = {}  # by storage: views of one tensor are kept once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in others:
            kept[storage._cdata] = tensor
        return tensor

    with (
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        out = work()
    backward = 0
    if out.requires_grad:
        with FlopCounterMode(display=False) as counter:
            out.backward(torch.empty_like(out))
        backward = counter.get_total_flops()
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Cost(forward.get_total_flops(), backward, saved)


def row_cost(module: nn.Module, row: Row, dtype: torch.dtype, checkpointing: bool) -> Cost:
    """One row through what a stage trains: a frozen and meta `module` with `requires_grad` set, in train mode."""
    _register()
    module = module.to(dtype)
    if isinstance(module, PreTrainedModel) and not isinstance(module, HovleForConditionalGeneration):
        x = torch.empty(1, row.tokens, module.config.hidden_size, dtype=dtype, device="meta")
        return _llm(module, x.requires_grad_(), row, checkpointing)
    model = find_hovle(module)
    embedding, config = model.embedding, model.config.embedding_config
    pixels = torch.empty(row.tiles, 3, config.image_size, config.image_size, dtype=dtype, device="meta")
    total = Cost()
    if row.tiles:
        total += measure(lambda: embedding.image_tokens(pixels), embedding)
    image_tokens = row.tiles * config.tokens_per_tile
    block_tokens = row.tokens + image_tokens * (config.block_tokens_per_placeholder - 1)
    learns = any(p.requires_grad for p in embedding.parameters())
    x = torch.empty(1, block_tokens, config.hidden_size, dtype=dtype, device="meta", requires_grad=learns)
    embedding.set_attn_implementation(COUNTED_ATTENTION)
    total += _stack(embedding, x, row.sample * block_tokens / row.tokens, checkpointing)
    out = torch.empty(1, row.tokens, config.hidden_size, dtype=dtype, device="meta", requires_grad=learns)
    if config.pixel_shuffle_loc == "post" and row.tiles:
        wide = torch.empty(
            row.tiles, config.patches_per_side**2, config.hidden_size, dtype=dtype, device="meta"
        )
        wide.requires_grad_(learns)
        total += measure(lambda: embedding.pixel_shuffle_proj(wide), embedding)
    if not isinstance(module, DistillationModule):
        return total + _llm(model.language_model, out, row, checkpointing)
    for head in (*module.block_heads, module.head):
        total += measure(partial(_taught, head, out[0, :image_tokens]), module)
    return total + measure(lambda: _matched(out[0, image_tokens:]), module)


def _taught(head: nn.Module, student: Tensor) -> Tensor:
    return _matched(head(student))


def _matched(student: Tensor) -> Tensor:
    return cosine_loss(student, torch.empty(student.shape, dtype=torch.float32, device="meta"))


def _llm(llm: PreTrainedModel, x: Tensor, row: Row, checkpointing: bool) -> Cost:
    llm.set_attn_implementation(COUNTED_ATTENTION)
    decoder, head = llm.get_decoder(), llm.get_output_embeddings()
    total = _stack(decoder, x, row.sample, checkpointing)
    total += measure(lambda: decoder.norm(x), llm)
    hidden = torch.empty(row.targets, x.shape[-1], dtype=x.dtype, device="meta", requires_grad=True)
    work = measure(lambda: head(hidden), llm)
    # Kept: their softmax in float32. Beside it for a moment: the logits in float32, and as the head gives them. What is
    # larger than the limit is computed in chunks.
    logits = 4.0 * row.targets * head.out_features
    if logits > LARGEST_LOGITS:
        return total + Cost(work.forward, work.backward, 0.0, 3.0 * CHUNK_LOGITS)
    return total + Cost(
        work.forward, work.backward, logits, logits * (1.5 if x.dtype != torch.float32 else 1.0)
    )


def _stack(stack: Any, x: Tensor, sample: float, checkpointing: bool) -> Cost:
    """All layers of a stack on `x [1, T, D]`; `sample` is the length of the samples in it."""
    layers = list(cast(Iterable[nn.Module], stack.layers))
    positions = torch.arange(x.shape[1], device="meta")[None]
    # cos and sin: made here, for RoPE that depends on the length asks for the positions' values.
    wide = (1, x.shape[1], 2 * stack.rotary_emb.inv_freq.shape[-1])
    rope = (x.new_empty(wide), x.new_empty(wide))
    layer = layers[-1]  # gradients reach its input where any layer learns
    inputs = x.detach().requires_grad_(x.requires_grad or any(p.requires_grad for p in stack.parameters()))
    one = measure(
        lambda: layer(inputs, attention_mask=None, position_embeddings=rope, position_ids=positions),
        layer,
        rope,
    )
    once = Cost(saved=sum(t.nbytes for t in rope) if inputs.requires_grad else 0)
    config = stack.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attends = (
        getattr(config, "token_mixer", ATTENTION) == ATTENTION
    )  # else its products are counted with the layer's
    scores = 4.0 * width * x.shape[1] * sample * CAUSAL_SHARE * attends
    one += Cost(scores, 2 * scores if inputs.requires_grad else 0)
    if not (checkpointing and inputs.requires_grad):
        return once + one * len(layers)
    return once + Cost(
        one.forward * len(layers),
        (one.backward + one.forward) * len(layers),
        x.numel() * x.element_size() * len(layers),
        one.saved,  # of the layer whose turn it is
    )
