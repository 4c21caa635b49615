"""Attention over packed samples, as one more implementation behind transformers' attention interface.

A packed batch is `[1, T]` with `position_ids` that restart at 0 for each sample; attention must not cross samples.
transformers' `sdpa` and `eager` read that off `position_ids` and build a `[T, T]` mask, `flash_attention_2` runs
its varlen kernel. On a CPU the mask costs T² and SDPA's backward is slow on short samples, so `hovle_packed` pads
samples of like length into small batches and multiplies plainly (benchmarks/packed_attention.py has the ratios).

Shapes: T packed tokens, n samples in a group, L longest of them, H heads, K key-value heads, d head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "hovle_packed"
# Samples longer than this attend one by one through SDPA, whose memory is linear in L.
LONGEST_GROUPED_SAMPLE = 192
# A group holds samples at least this share as long as its longest: bounds what padding wastes.
GROUP_LENGTH_SHARE = 0.75


class _Move(torch.autograd.Function):
    """`x [R, C]` -> zeros `[rows, C]` with row `source[i]` of x at row `target[i]`.

    Indices are unique, so that the backward is the same move in reverse and not a slow accumulating one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.rows = x.shape[0]
        return x.new_zeros(rows, x.shape[1]).index_copy_(0, target, x.index_select(0, source))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        source, target = ctx.saved_tensors
        out = grad.new_zeros(ctx.rows, grad.shape[1])
        return out.index_copy_(0, source, grad.index_select(0, target)), None, None, None


@dataclass(frozen=True)
class Group:
    """Samples of like length, padded to `length` each."""

    num_samples: int
    length: int

    @property
    def rows(self) -> int:
        return self.num_samples * self.length


@dataclass(frozen=True)
class Packing:
    """How a packed row splits into samples; made once a forward, used by every layer of both stacks.

    tokens, slots: `[T]`; token `tokens[i]` of the packed row is row `slots[i]` of the padded groups, which lie one
    behind the other.
    """

    groups: tuple[Group, ...]
    tokens: Tensor
    slots: Tensor

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> "Packing | None":
        """`position_ids [1, T]` -> Packing; None where nothing is packed (one sample a row, or a batch of rows)."""
        if position_ids.shape[0] != 1:
            return None
        row = position_ids[0]
        starts = (torch.diff(row, prepend=row[:1] - 1) != 1).nonzero()[:, 0].tolist()
        if not starts:
            return None
        spans = sorted(
            zip([0, *starts], [*starts, row.shape[0]], strict=True), key=lambda span: span[0] - span[1]
        )
        groups: list[list[tuple[int, int]]] = []
        for start, end in spans:  # longest first
            longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
            if groups and longest <= LONGEST_GROUPED_SAMPLE and end - start >= GROUP_LENGTH_SHARE * longest:
                groups[-1].append((start, end))
            else:
                groups.append([(start, end)])
        made = tuple(Group(len(members), members[0][1] - members[0][0]) for members in groups)
        tokens, slots, base = [], [], 0
        for group, members in zip(made, groups, strict=True):
            for i, (start, end) in enumerate(members):
                tokens.append(torch.arange(start, end))
                slots.append(torch.arange(end - start) + base + i * group.length)
            base += group.rows
        return cls(made, torch.cat(tokens).to(row.device), torch.cat(slots).to(row.device))


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float) -> Tensor:
    """Causal attention of a padded group, `[n, H, L, d]`: padding sits at the end, so causality hides it."""
    L = q.shape[2]
    if L > LONGEST_GROUPED_SAMPLE:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout)
    hidden = torch.full((L, L), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    weights = (torch.matmul(q * scaling, k.transpose(-1, -2)) + hidden).softmax(-1)
    return torch.matmul(F.dropout(weights, dropout) if dropout else weights, v)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
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
    heads = [x.shape[1] for x in (query, key, value)]
    row = torch.cat([x[0].transpose(0, 1).reshape(T, -1) for x in (query, key, value)], dim=-1)
    padded = _Move.apply(row, packing.tokens, packing.slots, sum(group.rows for group in packing.groups))
    outs = []
    for group, rows in zip(
        packing.groups, padded.split([group.rows for group in packing.groups]), strict=True
    ):
        batch = rows.view(group.num_samples, group.length, -1, d).transpose(1, 2)  # [n, H + 2K, L, d]
        q, k, v = batch.split(heads, dim=1)
        if k.shape[1] != H:
            k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
        out = _grouped_attention(q, k, v, scaling, dropout)
        outs.append(out.transpose(1, 2).reshape(group.rows, H * d))
    out = _Move.apply(torch.cat(outs) if len(outs) > 1 else outs[0], packing.slots, packing.tokens, T)
    return out.view(1, T, H, d), None


def _packed_mask(
    *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """No mask for one packed row or plain causal rows, which `packing` and `is_causal` handle; else SDPA's mask."""
    plain = kwargs["batch_size"] == 1 or kwargs.get("allow_is_causal_skip", True)
    if (
        attention_mask is None
        and int(q_length) == int(kv_length)
        and plain
        and kwargs.get("local_size") is None
    ):
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Make `attn_implementation="hovle_packed"` known to transformers (done by importing hovle_core.modeling)."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, _packed_mask)
