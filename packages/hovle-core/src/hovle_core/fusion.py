"""Where image tokens go: placeholders in `input_ids` are filled in order, and any mismatch is an error.

Shapes: B batch, T tokens in `input_ids` and in the LLM, E tokens in the embedding blocks (E = T for HoVLE; an
image placeholder counts r times in them for HoVLE-HD), N tiles, P image tokens a tile, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def place_image_tokens(embeds: Tensor, is_image: Tensor, image_tokens: Tensor) -> Tensor:
    """`embeds [B, T, D]` with the rows where `is_image [B, T]` replaced by `image_tokens [M, D]`, in order.

    All may be of other devices: a `device_map` puts each part of the embedding somewhere.
    """
    return embeds.masked_scatter(is_image.to(embeds.device).unsqueeze(-1), image_tokens.to(embeds))


def number_images(is_image: Tensor, position_ids: Tensor, past: int = 0) -> Tensor:
    """`is_image [B, T]` -> `[B, past + T]`: which image of its row a token belongs to, -1 for text and what is cached.

    An image is a run of placeholders, over all its tiles; where `position_ids [B, T]` restart another sample begins.
    """
    restarts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    before = F.pad(is_image, (1, -1))
    starts = is_image & (~before | restarts)
    return F.pad(torch.where(is_image, starts.long().cumsum(1) - 1, -1), (past, 0), value=-1)


def number_samples(position_ids: Tensor) -> Tensor:
    """`position_ids [B, T]` -> `[B, T]`: which sample of its row a token belongs to, from 0; positions that restart
    begin another one."""
    restarts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    return restarts.long().cumsum(1)


def check_placeholders(num_placeholders: int, num_tiles: int, tokens_per_tile: int) -> None:
    """Raise ValueError with both counts unless the placeholders are exactly what the tiles need."""
    if num_placeholders != num_tiles * tokens_per_tile:
        raise ValueError(
            f"input_ids hold {num_placeholders} image placeholders, but pixel_values hold {num_tiles} tiles of "
            f"{tokens_per_tile} tokens = {num_tiles * tokens_per_tile}; build both with one HovleProcessor call"
        )


@dataclass(frozen=True)
class Expansion:
    """The embedding blocks' view of a batch whose image placeholders count r times there (HoVLE-HD).

    source: `[B, E]` index into T of the token each block position comes from (padding: 0); None where tokens and
        block positions are the same (HoVLE, and text behind a cache).
    attention_mask: `[B, past + E]` 1 where a block position is real; rows that are shorter are padded on the left.
        Behind a static cache the finished mask `[B, 1, E, length]`, whose shape no step changes.
    position_ids: `[B, E]` positions as the blocks count them, from 0 in every sample.
    """

    source: Tensor | None
    attention_mask: Tensor
    position_ids: Tensor

    def gather(self, values: Tensor) -> Tensor:
        """`[B, T, ...] -> [B, E, ...]`, a placeholder's value repeated for each of its block positions."""
        assert self.source is not None
        index = self.source.view(*self.source.shape, *[1] * (values.ndim - 2)).expand(
            -1, -1, *values.shape[2:]
        )
        return values.gather(1, index)


def expand_placeholders(
    is_image: Tensor, repeats: int, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Expansion:
    """Lay out `is_image [B, T]` with every image position repeated `repeats` times.

    `attention_mask [B, T]` drops padding; `position_ids [B, T]` that restart mark packed samples, whose block
    positions then restart as well.
    """
    B, T = is_image.shape
    device = is_image.device
    counts = torch.where(is_image, repeats, 1)
    if attention_mask is not None:
        counts = counts * attention_mask.to(counts.dtype)
    lengths = counts.sum(1)
    E = int(lengths.max())
    source = torch.zeros(B, E, dtype=torch.long, device=device)
    mask = torch.arange(E, device=device).expand(B, E) >= (E - lengths).unsqueeze(1)
    tokens = torch.arange(T, device=device)
    source[mask] = torch.cat([tokens.repeat_interleave(row) for row in counts])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    if position_ids is not None:
        sample = number_samples(position_ids).expand(B, T).gather(1, source)
        first = torch.diff(sample, prepend=sample[:, :1] - 1) != 0
        start = torch.where(first, positions, 0).cummax(1).values
        positions = torch.where(mask, positions - start, 0)
    return Expansion(source=source, attention_mask=mask.long(), position_ids=positions)


def text_step(is_image: Tensor, repeats: int, attention_mask: Tensor, new: int) -> Expansion:
    """The blocks' view of the last `new` tokens, which are text, behind a cache of all tokens before them.

    is_image, attention_mask: `[B, past + new]`, with the cached tokens: how far a row's pictures expand decides how
    far the row is padded.
    """
    lengths = (torch.where(is_image, repeats, 1) * attention_mask).sum(1, keepdim=True)
    widest = int(lengths.max())
    device = is_image.device
    mask = torch.arange(widest, device=device) >= widest - lengths
    return Expansion(None, mask.long(), lengths - new + torch.arange(new, device=device))


def after_cache(
    is_image: Tensor, repeats: int, past: int, attention_mask: Tensor | None, padded: bool = False
) -> Expansion:
    """The blocks' view of new text and pictures `is_image [B, T]` that follow `past` cached block positions.

    padded: whether the blocks' cached rows are. Raises ValueError where rows are padded or their new pictures expand
    unlike: how far each row's pictures expand is then not known from here. `generate` passes an expansion on its own.
    """
    new = expand_placeholders(is_image, repeats)
    padded = padded or (attention_mask is not None and not bool(attention_mask.all()))
    if padded or not bool(new.attention_mask.all()):
        raise ValueError(
            "rows are padded behind a HoVLE-HD cache (attention_mask, or unlike numbers of tiles), so their padding in "
            "the embedding blocks is unlike too: give one row at a time; text alone also goes on from the whole "
            "input_ids in generate, or with `expansion`"
        )
    return Expansion(new.source, F.pad(new.attention_mask, (past, 0), value=1), new.position_ids + past)
