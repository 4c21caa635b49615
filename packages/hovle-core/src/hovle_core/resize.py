"""Bicubic resizing of RGB pictures: Pillow's pixels, which the released models were trained with, or close to them.

`resize_exact` is Pillow's own arithmetic either way. Where numba is installed (extra `fast-images`) large pictures go
through `hovle_core.resize_kernels`, which does the same sums many at a time: the same bytes, in a third of the time
(benchmarks/image_processor.py).

Shapes: h, w of the picture; H, W of what it is resized to.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from torch.nn import functional as F

logger = logging.getLogger(__name__)

# Rows taken out of Pillow at a time: they stay in the CPU's cache, and `np.array` writes a whole picture thrice.
BAND = 128
WORD, LONG_WORD = np.dtype("<u4"), np.dtype("<u8")
# With fewer pixels than this, of the picture and of what it becomes, Pillow is done before numba is imported.
SMALLEST_COMPILED = 2**20


def resize_exact(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """RGB picture -> uint8 `[3, H, W]` for each (W, H): the bytes of `image.resize((W, H), BICUBIC)`.

    Like those of resize_close these are views; how they lie in memory is what was quickest to make.
    """
    alike = [size for size in sizes if not vertical_first(image.size, size)]
    # Once one size is large enough to have numba loaded, the small ones are quicker so, too.
    compiled = alike if any(_is_large(image.size, size) for size in alike) and _has_numba() else []
    resized: dict[tuple[int, int], np.ndarray] = {}
    if compiled:
        image.load()  # what is wrong with the picture is raised here
        try:
            resized = dict(zip(compiled, _compiled(image, compiled), strict=True))
        except OSError as error:
            _warn_once(
                f"Pillow resizes pictures now, more slowly: numba could not keep what it compiled ({error}). "
                "NUMBA_CACHE_DIR names another folder for it"
            )
    for size in sizes:
        if size not in resized:
            resized[size] = _pixels(image.resize(size, Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    return [resized[size] for size in sizes]


def resize_close(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """As resize_exact, with PyTorch's bicubic: Pillow's filter with coefficients of 16 bits, a level or two off."""
    pixels = torch.from_numpy(_pixels(image)).permute(2, 0, 1)[
        None
    ]  # channels last, which has the SIMD kernel
    resized = [
        F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True) for width, height in sizes
    ]
    return [x[0].numpy() for x in resized]


def vertical_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow resizes the columns of such a picture before its rows, which rounds between them.

    Always rows first before Pillow 13, which resizes first where more than twice as many rows as columns go.
    """
    (w, h), (W, H) = source, target
    return int(pillow_version.split(".")[0]) >= 13 and h > H and h - H > 2 * (w - W)


@cache
def _warn_once(message: str) -> None:
    """numba raises once for each of its functions, and works from then on without having kept them."""
    logger.warning(message)


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


def _is_large(source: tuple[int, int], target: tuple[int, int]) -> bool:
    return source[0] * source[1] + target[0] * target[1] >= SMALLEST_COMPILED


def _compiled(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Rows first, band by band, for all sizes at once; then columns."""
    from hovle_core import resize_kernels as kernels

    width, height = image.size
    across = [kernels.coefficients(width, W) for W, _ in sizes]
    narrowed = [np.empty((_eights(height), 3, _eights(W)), np.uint8) for W, _ in sizes]
    # A column of each channel is one line of bytes.
    turned = np.zeros((width, 3, BAND), np.uint8)
    turned_rows = [np.zeros((_eights(W), 3, BAND), np.uint8) for W, _ in sizes]
    for top, band in _bands(image):
        # As Pillow keeps them, with a fourth byte: copied, while those of three are written one by one.
        pixels = np.frombuffer(band.tobytes("raw", "RGBX"), WORD).reshape(-1, width)
        kernels.turn(pixels, turned.view(LONG_WORD))
        for coefficients, columns, rows, (W, _) in zip(across, turned_rows, narrowed, sizes, strict=True):
            out = columns.reshape(-1, 3 * BAND)[:W]
            kernels.resize_rows(turned.reshape(width, -1), *coefficients, out)
            kernels.turn_back(columns.view(LONG_WORD), top, len(pixels), rows.view(LONG_WORD))
    resized = []
    for rows, (W, H) in zip(narrowed, sizes, strict=True):
        out = np.empty((H, *rows.shape[1:]), np.uint8)
        lines = rows.reshape(len(rows), -1)
        kernels.resize_columns(lines, *kernels.coefficients(height, H), out.reshape(H, -1))
        resized.append(out.transpose(1, 0, 2)[:, :, :W])
    return resized


def _eights(length: int) -> int:
    """`length` rounded up to a multiple of eight."""
    return -(-length // 8) * 8


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(top, up to BAND rows) from top to bottom, whole eights: behind the last row come black ones."""
    width, height = image.size
    for top in range(0, height, BAND):
        yield top, image.crop((0, top, width, min(top + BAND, _eights(height))))


def _pixels(image: Image.Image) -> np.ndarray:
    """RGB -> uint8 `[h, w, 3]`, one's own to write to."""
    width, height = image.size
    pixels = np.empty((_eights(height), width, 3), np.uint8)
    for top, band in _bands(image):
        pixels[top : top + band.height] = np.asarray(band)
    return pixels[:height]
