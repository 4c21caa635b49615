"""Pictures of samples: core's decoding, with failures laid at a sample's door."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hovle_core import images
from hovle_data.schema import BadSample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from hovle_data.streams import Processor


def decode_image(
    data: bytes, *, key: str = "", source: str = "", max_pixels: int = images.MAX_PIXELS
) -> Image.Image:
    """`hovle_core.images.decode_image`; raises `BadSample` with key, source where that raises `ImageError`."""
    try:
        return images.decode_image(data, max_pixels=max_pixels)
    except images.ImageError as error:
        raise BadSample(key, source, str(error)) from error


def cut_tiles(processor: Processor, data: bytes) -> NDArray[np.uint8]:
    """The tiles of a picture file, uint8 `[N, S, S, 3]`; raises `BadSample` where it does not decode."""
    try:
        return processor.tiles(data)
    except images.ImageError as error:
        raise BadSample("", "", str(error)) from error


def image_suffix(data: bytes) -> str | None:
    """The customary suffix by the first bytes ("png", "jpg", ...); None if `decode_image` would not know it."""
    for magic, suffix in (
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"\xff\xd8\xff", "jpg"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"BM", "bmp"),
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
    ):
        if data.startswith(magic):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "ppm"
    return None
