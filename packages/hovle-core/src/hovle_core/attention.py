"""Attention over packed samples, as one more implementation behind transformers' attention interface.

A packed batch is `[1, T]` with `position_ids` that restart at 0 for each sample; attention must not cross samples.
transformers' `sdpa` and `eager` read that off `position_ids` and build a `[T, T]` mask, `flash_attention_2` runs
its varlen kernel. On a CPU the mask costs T² and SDPA's backward is slow on short samples, so `hovle_packed` pads
samples of like length into small batches and multiplies plainly (benchmarks/packed_attention.py has the ratios).

Shapes: T packed tokens, n samples in a group, L longest of them, H heads, K key-value heads, d head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "hovle_packed"
# Samples longer than this attend one by one through SDPA, whose memory is linear in L.
LONGEST_GROUPED_SAMPLE = 192
# A group holds samples at least this share as long as its longest: bounds what padding wastes.
GROUP_LENGTH_SHARE = 0.75


class _Scatter(torch.autograd.Function):
    """`x [T, C]` -> zeros `[rows, C]` with x at `where`; the backward is a plain gather, not an index_add."""

    @staticmethod
    def forward(ctx, x: Tensor, where: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(where)
        out = x.new_zeros(rows, *x.shape[1:])
        out[where] = x
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (where,) = ctx.saved_tensors
        return grad[where], None, None


@dataclass(frozen=True)
class Group:
    """Samples of like length: token j of the packed row at `tokens[j]` sits in row `slots[j]` of the padded batch."""

    tokens: Tensor
    slots: Tensor
    num_samples: int
    length: int


@dataclass(frozen=True)
class Packing:
    """How a packed row splits into samples; made once a forward, used by every layer of both stacks."""

    groups: tuple[Group, ...]
    restore: Tensor  # [T] index that puts the groups' tokens, concatenated, back in the packed order

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> "Packing | None":
        """`position_ids [1, T]` -> Packing; None where nothing is packed (one sample a row, or a batch of rows)."""
        if position_ids.shape[0] != 1:
            return None
        row = position_ids[0]
        starts = (torch.diff(row, prepend=row[:1] - 1) != 1).nonzero()[:, 0].tolist()
        if not starts:
            return None
        ends = [*starts, row.shape[0]]
        spans = sorted(zip([0, *starts], ends, strict=True), key=lambda span: span[0] - span[1])
        groups: list[list[tuple[int, int]]] = []
        for start, end in spans:  # longest first
            length, longest = end - start, groups[-1][0][1] - groups[-1][0][0] if groups else 0
            if groups and longest <= LONGEST_GROUPED_SAMPLE and length >= GROUP_LENGTH_SHARE * longest:
                groups[-1].append((start, end))
            else:
                groups.append([(start, end)])
        made = tuple(_group(spans, row.device) for spans in groups)
        return cls(made, torch.cat([group.tokens for group in made]).argsort())


def _group(spans: list[tuple[int, int]], device: torch.device) -> Group:
    length = spans[0][1] - spans[0][0]
    tokens = torch.cat([torch.arange(start, end, device=device) for start, end in spans])
    slots = torch.cat(
        [torch.arange(end - start, device=device) + i * length for i, (start, end) in enumerate(spans)]
    )
    return Group(tokens, slots, len(spans), length)


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float) -> Tensor:
    """Causal attention of a padded group, `[n, H, L, d]`: padding sits at the end, so causality hides it."""
    L = q.shape[2]
    if L > LONGEST_GROUPED_SAMPLE:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout)
    hidden = torch.full((L, L), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    weights = (torch.matmul(q * scaling, k.transpose(-1, -2)) + hidden).softmax(-1)
    return torch.matmul(F.dropout(weights, dropout) if dropout else weights, v)


def packed_attention_forward(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling=None, dropout=0.0, packing=None, **kwargs
):
    """Attention function of `hovle_packed`: query `[1, H, T, d]`, key and value `[1, K, T, d]` -> `[1, T, H, d]`.

    `packing` comes from HovleForConditionalGeneration.forward; without it this is transformers' SDPA.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    window, longest = kwargs.get("sliding_window"), max(group.length for group in packing.groups)
    if window is not None and longest > window:
        raise ValueError(
            f"attn_implementation {PACKED_ATTENTION!r} has no sliding window, and a packed sample has {longest} tokens "
            f"against this layer's window of {window}; pack shorter samples or choose attn_implementation 'sdpa'"
        )
    H, T, d = query.shape[1:]
    scaling = d**-0.5 if scaling is None else scaling
    rows = [x[0].transpose(0, 1).reshape(T, -1) for x in (query, key, value)]
    outs = []
    for group in packing.groups:
        n, L = group.num_samples, group.length
        q, k, v = (
            _Scatter.apply(x[group.tokens], group.slots, n * L).view(n, L, -1, d).transpose(1, 2) for x in rows
        )
        if k.shape[1] != H:
            k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
        out = _grouped_attention(q, k, v, scaling, dropout)
        outs.append(out.transpose(1, 2).reshape(n * L, H * d)[group.slots])
    return torch.cat(outs)[packing.restore].view(1, T, H, d), None


def _packed_mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs):
    """No mask for one packed row or plain causal rows, which `packing` and `is_causal` handle; else SDPA's mask."""
    plain = kwargs["batch_size"] == 1 or kwargs.get("allow_is_causal_skip", True)
    if attention_mask is None and int(q_length) == int(kv_length) and plain and kwargs.get("local_size") is None:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Make `attn_implementation="hovle_packed"` known to transformers (done by importing hovle_core.modeling)."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, _packed_mask)
