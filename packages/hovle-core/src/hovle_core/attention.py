"""Attention over packed samples: how it is said, and one more implementation behind transformers' attention interface.

A batch is packed when its `position_ids` restart at 0 for each sample, with neither attention_mask nor cache; samples
then cannot see each other. That is transformers' own convention and the only one here: its masks for `sdpa`, `eager`
and `flex_attention` follow from it, `flash_attention_2` runs its varlen kernel on one packed row, and `hovle_packed`
reads the samples off the same mask. On a CPU the `[T, T]` mask costs T² and SDPA's backward is slow on short samples,
so `hovle_packed` pads samples of like length into small batches and multiplies plainly.
benchmarks/packed_attention.py has the ratio.

Shapes: T packed tokens, n samples in a group, L longest of them, H heads, K key-value heads, d head size.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

PACKED_ATTENTION = "hovle_packed"
# Samples longer than this attend one by one through SDPA, whose memory is linear in L.
LONGEST_GROUPED_SAMPLE = 192
# Up to this length a CPU multiplies in float32, under autocast, too: in bfloat16 oneDNN makes a kernel for every new
# shape of a group, and groups are of a new shape in nearly every step.
LONGEST_IN_FLOAT32 = 128
# A group holds samples at least this share as long as its longest: bounds what padding wastes.
GROUP_LENGTH_SHARE = 0.75

# transformers' `mask_function(batch, head, query, key)`: True where the query may see the key.
MaskFunction = Callable[..., Tensor]


def check_packing(
    position_ids: Tensor,
    attention_mask: Tensor | None,
    cached: bool,
    implementations: Sequence[str | None],
) -> None:
    """Refuse what would let packed samples see each other. `position_ids [B, T]`, `attention_mask [B, past + T]`.

    Raises ValueError where positions restart beside a mask or a cache, or in several rows under flash attention.
    """
    if not (attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2)):
        return  # a ready mask says all by itself
    if position_ids.shape[1] == 1:
        return  # a step of generate, which should not wait for the device
    restarts = torch.diff(position_ids, dim=1) != 1
    if attention_mask is not None:
        real = attention_mask[:, -position_ids.shape[1] :].bool()
        restarts = restarts & real[:, 1:] & real[:, :-1]
    if not bool(restarts.any()):
        return
    if cached:
        raise ValueError("position_ids restart (packed samples) but use_cache is on: pass use_cache=False")
    if attention_mask is not None:
        raise ValueError(
            "position_ids restart (packed samples) but attention_mask is given: leave it out, packed rows have none"
        )
    for name in implementations:
        if "flash" in str(name) and position_ids.shape[0] > 1:
            raise ValueError(
                f"position_ids hold {position_ids.shape[0]} packed rows, and attn_implementation {name!r} takes one: "
                "join them into one row [1, T]"
            )


class _Move(torch.autograd.Function):
    """Rows of `x [R, C]` in another order: row `take[i]` at place i of the result, and zeros at the places `empty`.

    `back` undoes it: row r of x went to place `back[r]`. So the backward takes rows, too, where autograd's own would
    add them up one by one, which is slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, empty: Tensor, back: Tensor, none: Tensor) -> Tensor:
        ctx.save_for_backward(back, none)
        return _take(x, take, empty)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        back, none = ctx.saved_tensors
        return _take(grad, back, none), None, None, None, None


def _take(x: Tensor, take: Tensor, empty: Tensor) -> Tensor:
    return x.index_select(0, take).index_fill_(0, empty, 0)


@dataclass(frozen=True)
class Group:
    """Samples of like length, padded to `length` each; `mask [n, 1, L, L]` is True where a query sees a key, None
    where all is causal."""

    num_samples: int
    length: int
    mask: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.num_samples * self.length


@dataclass(frozen=True)
class Packing:
    """How a packed row splits into samples: the mask of `hovle_packed`, made once a forward and stack.

    The padded groups lie one behind the other, R rows in all. slots: `[T]`, each token's row among them. tokens: `[R]`,
    each row's token, any one for the padding, whose rows are in `padding`.
    """

    groups: tuple[Group, ...]
    slots: Tensor
    tokens: Tensor
    padding: Tensor

    def pad(self, row: Tensor) -> Tensor:
        """`[T, C]` -> `[R, C]`, the padding zero."""
        return _Move.apply(row, self.tokens, self.padding, self.slots, self.padding[:0])

    def unpad(self, padded: Tensor) -> Tensor:
        """`[R, C]` -> `[T, C]`."""
        return _Move.apply(padded, self.slots, self.padding[:0], self.tokens, self.padding)

    def to(self, device: torch.device) -> "Packing":
        return replace(
            self, **{name: getattr(self, name).to(device) for name in ("slots", "tokens", "padding")}
        )

    @classmethod
    def from_mask_function(
        cls, mask_function: MaskFunction, length: int, window: int | None, device: torch.device | str
    ) -> "Packing | None":
        """The samples of one row of `length` tokens: one starts where a token cannot see the token before it.

        `window` is a local attention's size, if the layer has one. None where the row is one sample.
        """
        zero, index = torch.zeros((), dtype=torch.long, device=device), torch.arange(length, device=device)
        starts = (~mask_function(zero, zero, index[1:], index[:-1])).nonzero()[:, 0].add(1).tolist()
        if not starts:
            return None
        groups = _group_by_length(list(zip([0, *starts], [*starts, length], strict=True)))
        ahead = bool(mask_function(zero, zero, index[:-1], index[1:]).any())
        slots, made, base = torch.empty(length, dtype=torch.long), [], 0
        for members in groups:
            longest = members[0][1] - members[0][0]
            causal = not ahead and (window is None or longest <= window)
            mask = None if causal else _group_mask(mask_function, members, longest, device)
            made.append(Group(len(members), longest, mask))
            for i, (start, end) in enumerate(members):
                slots[start:end] = torch.arange(end - start) + base + i * longest
            base += made[-1].rows
        tokens = torch.full((base,), -1)
        tokens[slots] = torch.arange(length)
        padding = (tokens < 0).nonzero()[:, 0]
        return cls(tuple(made), slots, tokens.clamp(min=0), padding).to(torch.device(device))


def _group_by_length(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Spans of samples, longest first, in groups of like length; samples too long for a group stand alone."""
    groups: list[list[tuple[int, int]]] = []
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        if groups and longest <= LONGEST_GROUPED_SAMPLE and end - start >= GROUP_LENGTH_SHARE * longest:
            groups[-1].append((start, end))
        else:
            groups.append([(start, end)])
    return groups


def _group_mask(
    mask_function: MaskFunction, members: list[tuple[int, int]], length: int, device: torch.device | str
) -> Tensor:
    """`mask_function` within each sample of a group, `[n, 1, L, L]`; padding is seen by padding alone."""
    spans = torch.tensor(members, device=device)
    offsets = torch.arange(length, device=device)
    real = offsets < (spans[:, 1] - spans[:, 0]).unsqueeze(1)  # [n, L]
    index = torch.where(real, spans[:, :1] + offsets, spans[:, :1]).unsqueeze(1)  # [n, 1, L]
    zero = torch.zeros((), dtype=torch.long, device=device)
    seen = mask_function(zero, zero, index.unsqueeze(-1), index.unsqueeze(-2))
    keys = real[:, None, None, :]
    return torch.where(real[:, None, :, None], seen & keys, ~keys)


def _grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """Attention of a padded group, `[n, H, L, d]`. Causality hides the padding, which sits at the end."""
    L = q.shape[2]
    if L > LONGEST_GROUPED_SAMPLE:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout
        )
    if mask is None:
        mask = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    dtype = q.dtype
    small = q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) and L <= LONGEST_IN_FLOAT32
    if small:
        q, k, v = q.float(), k.float(), v.float()
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    with torch.autocast(q.device.type, enabled=False) if small else nullcontext():
        weights = (torch.matmul(q * scaling, k.transpose(-1, -2)) + hidden).softmax(-1)
        return torch.matmul(F.dropout(weights, dropout) if dropout else weights, v).to(dtype)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Packing | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of `hovle_packed`: query `[1, H, T, d]`, key and value `[1, K, T, d]` -> `[1, T, H, d]`.

    Where nothing is packed this is transformers' SDPA, for any batch.
    """
    if not isinstance(attention_mask, Packing):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    H, T, d = query.shape[1:]
    scaling = d**-0.5 if scaling is None else scaling
    device = query.device
    packing = attention_mask.to(device)
    groups = packing.groups
    heads = [x.shape[1] for x in (query, key, value)]
    row = torch.cat([x[0].transpose(0, 1).reshape(T, -1) for x in (query, key, value)], dim=-1)
    padded = packing.pad(row)
    outs = []
    for group, rows in zip(groups, padded.split([group.rows for group in groups]), strict=True):
        batch = rows.view(group.num_samples, group.length, -1, d).transpose(1, 2)  # [n, H + 2K, L, d]
        q, k, v = batch.split(heads, dim=1)
        if k.shape[1] != H:
            k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
        mask = None if group.mask is None else group.mask.to(device)
        out = _grouped_attention(q, k, v, mask, scaling, dropout)
        outs.append(out.transpose(1, 2).reshape(group.rows, H * d))
    out = packing.unpad(torch.cat(outs) if len(outs) > 1 else outs[0])
    return out.view(1, T, H, d), None


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | Packing | None:
    """The mask of `hovle_packed`, as transformers' mask interface asks for it: the Packing of one packed row, else
    SDPA's mask. (What arrives with `use_vmap` may not be evaluated by index.)"""
    plain = kwargs.get("allow_is_causal_skip", True) or kwargs.get("use_vmap", False)
    if batch_size == 1 and attention_mask is None and not plain and q_length == kv_length > 1:
        packing = Packing.from_mask_function(mask_function, q_length, kwargs.get("local_size"), device)
        if packing is not None:
            return packing
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )


def register() -> None:
    """Make `attn_implementation="hovle_packed"` known to transformers (done by importing hovle_core.modeling)."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
