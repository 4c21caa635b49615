"""Packing: samples side by side in one row of tokens, with positions that restart and labels that never cross.

Shapes: T tokens of all samples, N tiles of all samples, S tile side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hovle_core.processor import Encoded

IGNORE_INDEX = -100  # in labels: no target; as `hovle_core.processor` has it, which would load transformers


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: several samples in one row.

    input_ids, position_ids, labels: int64 `[1, T]`. Positions restart at 0 with each sample; a sample's first
        token is never a target, for it would be predicted from the sample before it. Labels stand at their
        token, as in transformers: the loss shifts them.
    pixel_values: uint8 `[N, 3, S, S]`, tiles in the order of the samples, None without pictures.
    sample_lengths: tokens of each sample, summing to T (the boundaries attention must not cross).
    tile_keys: "<sample key>#<tile>" of each of the N tiles: names of tiles that mean the same picture every
        time.
    num_target_tokens: labels that count.
    num_padding: tokens at the row's end that belong to no sample (`padded`); T counts them, `num_tokens` does not.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    sample_lengths: list[int]
    keys: list[str]
    tile_keys: list[str]
    num_target_tokens: int
    num_padding: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of samples."""
        return self.input_ids.shape[1] - self.num_padding

    @property
    def num_tiles(self) -> int:
        return len(self.tile_keys)

    def padded(self, multiple: int, token_id: int) -> PackedBatch:
        """The same samples in a row whose T is a multiple: behind them one more that nothing is asked of.

        `token_id` must be no image placeholder. Its positions start at 0, so that no sample sees it.
        """
        missing = -self.input_ids.shape[1] % multiple
        if not missing:
            return self
        padding = torch.arange(missing)[None]
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, torch.full_like(padding, token_id)], dim=1),
            position_ids=torch.cat([self.position_ids, padding], dim=1),
            labels=torch.cat([self.labels, torch.full_like(padding, IGNORE_INDEX)], dim=1),
            num_padding=self.num_padding + missing,
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            pixel_values=None
            if self.pixel_values is None
            else self.pixel_values.to(device, non_blocking=True),
        )


@dataclass
class _Bin:
    tokens_left: int
    tiles_left: int
    members: list[int] = field(default_factory=list)

    def fits(self, sample: Encoded) -> bool:
        return self.tokens_left >= len(sample.input_ids) and self.tiles_left >= len(sample.tiles)

    def add(self, i: int, sample: Encoded) -> None:
        self.tokens_left -= len(sample.input_ids)
        self.tiles_left -= len(sample.tiles)
        self.members.append(i)


def pack(samples: Sequence[Encoded], max_tokens: int, max_tiles: int) -> list[PackedBatch]:
    """Best fit, longest first: each sample goes where the fewest tokens stay free, within both budgets of a batch.

    The same samples in the same order give the same batches; every token of every sample is in exactly one of
    them. Raises ValueError naming the sample for one that is empty or by itself over a budget.
    """
    bins: list[_Bin] = []
    for i in _longest_first(samples):
        _check(samples[i], max_tokens, max_tiles)
        fitting = [b for b in bins if b.fits(samples[i])]
        if fitting:
            best = min(fitting, key=lambda b: b.tokens_left)
        else:
            best = _Bin(max_tokens, max_tiles)
            bins.append(best)
        best.add(i, samples[i])
    return [join([samples[i] for i in sorted(b.members)]) for b in bins]


def best_fit(samples: Sequence[Encoded], max_tokens: int, max_tiles: int) -> list[int]:
    """Which of `samples` make the next row: the first, and beside it ever the longest that still fits both budgets.

    Raises ValueError naming a sample that is empty or by itself over a budget.
    """
    for sample in samples:
        _check(sample, max_tokens, max_tiles)
    row = _Bin(max_tokens, max_tiles)
    row.add(0, samples[0])
    for i in _longest_first(samples):  # what did not fit once will not fit later: one pass is enough
        if i and row.fits(samples[i]):
            row.add(i, samples[i])
    return sorted(row.members)


def _longest_first(samples: Sequence[Encoded]) -> list[int]:
    return sorted(range(len(samples)), key=lambda i: (-len(samples[i].input_ids), i))


def _check(sample: Encoded, max_tokens: int, max_tiles: int) -> None:
    tokens, tiles = len(sample.input_ids), len(sample.tiles)
    if tokens == 0:
        raise ValueError(f"sample {sample.key}: input_ids is empty; leave it out")
    if tokens > max_tokens:
        raise ValueError(
            f"sample {sample.key}: {tokens} tokens > max_tokens={max_tokens}; raise it or leave it out"
        )
    if tiles > max_tiles:
        raise ValueError(
            f"sample {sample.key}: {tiles} tiles > max_tiles={max_tiles}; raise it or leave it out"
        )


def join(samples: Sequence[Encoded]) -> PackedBatch:
    """Samples side by side in one row, in their order."""
    labels = [sample.labels.copy() for sample in samples]
    for row in labels:
        row[0] = IGNORE_INDEX
    joined_labels = np.concatenate(labels)
    with_tiles = [sample.tiles for sample in samples if len(sample.tiles)]
    pixel_values = _channels_first(with_tiles) if with_tiles else None
    return PackedBatch(
        input_ids=_row(np.concatenate([sample.input_ids for sample in samples])),
        position_ids=_row(np.concatenate([np.arange(len(sample.input_ids)) for sample in samples])),
        labels=_row(joined_labels),
        pixel_values=pixel_values,
        sample_lengths=[len(sample.input_ids) for sample in samples],
        keys=[sample.key for sample in samples],
        tile_keys=[f"{sample.key}#{tile}" for sample in samples for tile in range(len(sample.tiles))],
        num_target_tokens=int((joined_labels != IGNORE_INDEX).sum()),
    )


def _channels_first(tiles: Sequence[np.ndarray]) -> Tensor:
    """uint8 `[n, S, S, 3]` of each sample -> `[N, 3, S, S]`, every byte copied once, and whole planes at a time where
    they lie so (`HovleImageProcessor.tiles`)."""
    _, height, width, channels = tiles[0].shape
    out = np.empty((sum(map(len, tiles)), channels, height, width), np.uint8)
    start = 0
    for part in tiles:
        out[start : start + len(part)] = part.transpose(0, 3, 1, 2)
        start += len(part)
    return torch.from_numpy(out)


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))[None]
