"""DynProcess: a picture becomes tiles of one size, as many as its shape asks for (paper, section 3.1; InternVL).

Shapes: N tiles, S tile side in pixels.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from hovle_core.config import IMAGENET_MEAN, IMAGENET_STD, HovleConfig
from hovle_core.images import decode_image, image_size, to_rgb
from hovle_core.patch_embed import normalize_pixels
from hovle_core.resize import resize_close, resize_exact


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns · rows <= max_tiles, by area.

    Grids of one area keep the order in which the released code's `set` yields them: ties between them are
    decided by it, and its checkpoints were trained with it (tests/golden/dynprocess).
    """
    grids = {
        (columns, rows)
        for n in range(min_tiles, max_tiles + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


class HovleImageProcessor(BaseImageProcessor):
    """Cuts pictures into `tile_size` tiles on the best fitting grid, plus a thumbnail of the whole picture last.

    Args:
        tile_size: side of a tile in pixels.
        min_tiles, max_tiles: bounds for columns · rows (the thumbnail comes on top).
        use_thumbnail: append the whole picture as one tile if there is more than one.
        image_mean, image_std: per-channel normalisation after division by 255.
        do_normalize: whether `pixel_values` are normalised here, to float32. False leaves them uint8, a quarter of
            the bytes, and the model normalises them on its device with its config's mean and std.
        fast: close to the released pixels instead of equal to them. `tiles_of_file` decodes a JPEG at the smallest
            scale that covers the grid, and pixels are resized by PyTorch instead of Pillow (docs/speed.md has the
            differences).
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        tile_size: int = 448,
        min_tiles: int = 1,
        max_tiles: int = 12,
        use_thumbnail: bool = True,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        do_normalize: bool = True,
        fast: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if tile_size < 1 or not 1 <= min_tiles <= max_tiles:
            raise ValueError(
                f"tile_size {tile_size} must be positive and 1 <= min_tiles {min_tiles} <= max_tiles {max_tiles}"
            )
        self.tile_size = tile_size
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_normalize = do_normalize
        self.fast = fast

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The (columns, rows) whose shape is closest to width / height.

        On an exact tie the larger grid wins if the picture has more than half of that grid's pixels.
        """
        if width < 1 or height < 1:
            raise ValueError(f"width {width} and height {height} must be positive")
        aspect, best, best_difference = width / height, (1, 1), float("inf")
        for columns, rows in candidate_grids(self.min_tiles, self.max_tiles):
            difference = abs(aspect - columns / rows)
            enough_pixels = width * height > 0.5 * self.tile_size**2 * columns * rows
            if difference < best_difference or (difference == best_difference and enough_pixels):
                best, best_difference = (columns, rows), difference
        return best

    def num_tiles(self, width: int, height: int) -> int:
        """Tiles that a picture of this size becomes, thumbnail included."""
        columns, rows = self.grid(width, height)
        return columns * rows + int(self.use_thumbnail and columns * rows > 1)

    def tiles(self, image: Image.Image, grid: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 `[N, S, S, 3]`, row by row, the thumbnail last. `grid` (columns, rows) overrides the picture's own.

        In memory each channel lies by itself, as models want it: `transpose(0, 3, 1, 2)` is contiguous.
        """
        if image.mode == "F" or image.mode.startswith("I"):
            image = to_rgb(image)  # Pillow would clip them at 255
        elif image.mode != "RGB":
            image = image.convert("RGB")
        columns, rows = grid or self.grid(*image.size)
        size, count = self.tile_size, columns * rows
        has_thumbnail = self.use_thumbnail and count > 1
        sizes = [(columns * size, rows * size)] + [(size, size)] * has_thumbnail
        whole, *thumbnail = (resize_close if self.fast else resize_exact)(image, sizes)
        planes = np.empty((count + has_thumbnail, 3, size, size), np.uint8)
        cut = whole.reshape(3, rows, size, columns, size).transpose(1, 3, 0, 2, 4)
        planes[:count].reshape(cut.shape)[:] = cut
        if has_thumbnail:
            planes[count] = thumbnail[0]
        return planes.transpose(0, 2, 3, 1)

    def tiles_of_file(self, data: bytes) -> np.ndarray:
        """A picture file -> its tiles `[N, S, S, 3]`. Raises ImageError as `images.decode_image` does."""
        if not self.fast:
            return self.tiles(decode_image(data))
        columns, rows = self.grid(*image_size(data))  # a scaled picture's sides are rounded: not its grid
        needed = (columns * self.tile_size, rows * self.tile_size)
        return self.tiles(decode_image(data, at_least=needed), (columns, rows))

    def normalize(self, tiles: Tensor) -> Tensor:
        """uint8 `[N, 3, S, S]` -> float32 of the same shape, on the tiles' own device."""
        return normalize_pixels(tiles, self.image_mean, self.image_std)

    def pixel_values(self, tiles: Tensor) -> Tensor:
        """uint8 `[N, 3, S, S]` as the model gets them: normalised float32, or as they are (`do_normalize`)."""
        return self.normalize(tiles) if self.do_normalize else tiles

    def __call__(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str = "pt"
    ) -> BatchFeature:
        """One or many PIL images -> `pixel_values [N, 3, S, S]` of all their tiles and `num_tiles` a picture.

        Raises ValueError for anything that is not a PIL image, and for `return_tensors` other than "pt".
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        images = [images] if isinstance(images, Image.Image) else list(images)
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(
                    f"images must be PIL images, got {type(image).__name__}; open files with PIL.Image.open"
                )
        cut = [self.tiles(image) for image in images]
        tiles = torch.from_numpy(cut[0] if len(cut) == 1 else np.concatenate(cut)).permute(0, 3, 1, 2)
        return BatchFeature(
            {
                "pixel_values": self.pixel_values(tiles),
                "num_tiles": torch.tensor([len(tiles) for tiles in cut]),
            }
        )


AutoImageProcessor.register(
    HovleConfig,
    image_processor_classes={"pil": HovleImageProcessor, "torchvision": HovleImageProcessor},
    exist_ok=True,
)
