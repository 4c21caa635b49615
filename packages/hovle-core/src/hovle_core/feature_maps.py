"""What vision teachers share: tiles as an encoder wants them, and its feature maps on the grid that was asked for.

Shapes: N tiles, S tile side in pixels, h x w a teacher's grid, C_i channels of layer i, C their sum.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Resample = Literal["average", "bilinear", "bicubic", "nearest"]


def check_grid(size: int | None, grid: int | None, resample: str) -> None:
    """Raise ValueError for a side that is none, or a way of resampling that does not exist."""
    for field, side, unit in (("size", size, "pixels"), ("grid", grid, "cells")):
        if side is not None and side < 1:
            raise ValueError(f"{field}: must be a side in {unit} or null, got {side}")
    if resample not in get_args(Resample):
        raise ValueError(f"resample: {resample!r} is none of {', '.join(get_args(Resample))}")


def check_layers(feature_layer: int | Sequence[int], num_layers: int, what: str) -> list[int]:
    """Layers counted from 0, of one index or several, each of which may count from the end.

    Raises ValueError for one that `what` does not have, and for several that do not ascend.
    """
    given = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    for layer in given:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"feature_layer: {what} has {num_layers} layers, {layer} is not one of them; "
                f"give {-num_layers}..{num_layers - 1}"
            )
    layers = [layer % num_layers for layer in given]
    if not given or layers != sorted(set(layers)):
        raise ValueError(f"feature_layer: {given} must name each layer once, in ascending order")
    return layers


def per_channel(field: str, values: Sequence[float]) -> Tensor:
    """Red, green and blue as `[1, 3, 1, 1]`. Raises ValueError for another number of values."""
    if len(values) != 3:
        raise ValueError(f"{field}: needs three numbers, red, green and blue, got {list(values)}")
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


def resized_tiles(tiles: Tensor, size: int | None, patch: int) -> Tensor:
    """uint8 `[N, 3, S, S]` -> float 0..255 `[N, 3, size, size]`, bicubic and antialiased; None leaves S.

    Raises ValueError for a side that is not a whole number of patches.
    """
    x = tiles.float()
    if size is not None and tuple(x.shape[-2:]) != (size, size):
        # Bicubic overshoots; the clamp keeps the range that a picture file could have held.
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    if (side := x.shape[-1]) % patch:
        raise ValueError(
            f"tiles: {side} x {side} pixels are not a whole number of {patch} x {patch} patches; "
            f"set the teacher's size to a multiple of {patch}, e.g. {max(side // patch, 1) * patch}"
        )
    return x


def joined_maps(maps: Sequence[Tensor], grid: int | None, how: Resample) -> Tensor:
    """Maps `[N, C_i, h_i, w_i]` of layers -> `[N, C, grid, grid]`; on the last one's own grid where `grid` is None.

    Several are normalised over their channels, so that none outweighs another.
    """
    if len(maps) > 1:
        maps = [F.layer_norm(m.movedim(1, -1), m.shape[1:2]).movedim(-1, 1) for m in maps]
    h, w = maps[-1].shape[2:] if grid is None else (grid, grid)
    return torch.cat([resampled(features, (h, w), how) for features in maps], dim=1)


def resampled(features: Tensor, size: tuple[int, int], how: Resample) -> Tensor:
    """`[N, C, h, w]` on another grid: "average" of what falls into a cell, or interpolation."""
    if tuple(features.shape[2:]) == size:
        return features
    if how == "average":
        return F.adaptive_avg_pool2d(features, size)
    if how == "nearest":
        return F.interpolate(features, size, mode="nearest-exact")
    return F.interpolate(features, size, mode=how, align_corners=False, antialias=True)
