"""pixel_values -> patch tokens: the only image-specific weights of a HoVLE (paper, section 3.1).

Shapes: N tiles, S tile side in pixels, P patches a tile (S / patch_size, squared), D hidden size, s shuffle factor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hovle_core.config import HolisticEmbeddingConfig


def normalize_pixels(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 `[N, 3, S, S]` -> float32 of the same shape, `(pixels / 255 - mean) / std` a channel."""
    shift, scale = (torch.tensor(x, device=pixels.device).view(-1, 1, 1) * 255 for x in (mean, std))
    return pixels.to(torch.float32, copy=True).sub_(shift).div_(scale)  # one array, not three


def to_patches(pixels: Tensor, size: int) -> tuple[Tensor, int, int]:
    """`[N, C, H, W]` -> patches `[N, rows · columns, C · size²]` row by row, and (rows, columns).

    What does not fill a patch at the right and at the bottom is left out, as a convolution does.
    """
    n, channels, height, width = pixels.shape
    rows, columns = height // size, width // size
    x = pixels[..., : rows * size, : columns * size].reshape(n, channels, rows, size, columns, size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, channels * size**2), rows, columns


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Merge factor x factor neighbouring tokens into the channels: `[N, P, D] -> [N, P / s², D · s²]`.

    The order of the merged channels is the released code's (InternVL's `ps_version="v2"`), which its projection
    weights depend on. Raises ValueError if P is not the square of a multiple of `factor`.
    """
    n, patches, channels = x.shape
    side = round(patches**0.5)
    if side * side != patches or side % factor:
        raise ValueError(
            f"pixel shuffle by {factor} needs a square grid of such a multiple, got {patches} tokens a tile"
        )
    x = x.reshape(n, side, side // factor, channels * factor).permute(0, 2, 1, 3)
    x = x.reshape(n, side // factor, side // factor, channels * factor**2).permute(0, 2, 1, 3)
    return x.reshape(n, -1, channels * factor**2)


class PixelShuffleProjection(nn.Sequential):
    """Pixel shuffle, then an MLP back to D: `[N, P, D] -> [N, P / s², D]`."""

    def __init__(self, config: HolisticEmbeddingConfig):
        D = config.hidden_size
        self.factor = config.shuffle_factor
        super().__init__(nn.Linear(D * config.shuffle_factor**2, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pixel_shuffle(x, self.factor))


class PatchConv2d(nn.Conv2d):
    """A convolution whose patches do not overlap, `[N, C, H, W] -> [N, D, rows, columns]`, as the matrix product that
    it is: a bfloat16 convolution's backward is slow on CPUs. A module's own forward, so that accelerate and peft find
    it."""

    def forward(self, input: Tensor) -> Tensor:
        patches, rows, columns = to_patches(input, self.kernel_size[0])
        return (
            F.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2).unflatten(2, (rows, columns))
        )


class PatchEmbed(nn.Module):
    """Convolution into patches plus a learned position a patch: `[N, 3, S, S] -> [N, P, D]`.

    Tiles are normalised already, or uint8 as they were cut: those are normalised here, on this device.

    `position_embedding` has a slot 0 for a class token, and there is a `class_embedding`; the released model
    carries both and uses neither, and so do we, so that checkpoints convert tensor for tensor. The class
    embedding is a buffer: nothing trains it.
    """

    def __init__(self, config: HolisticEmbeddingConfig):
        super().__init__()
        self.patches_per_side = config.patches_per_side
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.patch_embedding = PatchConv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(
            torch.empty(1, 1 + self.patches_per_side**2, config.hidden_size)
        )
        self.register_buffer("class_embedding", torch.zeros(1, 1, config.hidden_size))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Learned positions `[1, rows · columns, D]`, resized bicubically when the grid is not the trained one."""
        table = self.position_embedding[:, 1:]
        side = self.patches_per_side
        if (rows, columns) == (side, side):
            return table
        grid = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2).to(table.dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_pixels(pixel_values, self.image_mean, self.image_std)
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # [N, D, rows, columns]
        return x.flatten(2).transpose(1, 2) + self.positions(x.shape[2], x.shape[3])
