"""Pictures of samples: core's decoding, with failures laid at a sample's door."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
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


class TileCache:
    """`cut_tiles` that keeps what it cut last, up to `max_bytes` of tiles, by the pictures' own bytes.

    For data that come back to a picture soon: small sets over several epochs, many questions about one picture.
    """

    def __init__(self, processor: Processor, max_bytes: int) -> None:
        self.processor, self.max_bytes = processor, max_bytes
        self._kept: OrderedDict[bytes, NDArray[np.uint8]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        if not self.max_bytes:
            return cut_tiles(self.processor, data)
        with self._lock:
            if (kept := self._kept.get(data)) is not None:
                self._kept.move_to_end(data)
                return kept
        tiles = cut_tiles(self.processor, data)
        tiles.flags.writeable = False  # every sample of this picture reads it
        with self._lock:
            if data not in self._kept:
                self._kept[data] = tiles
                self._bytes += tiles.nbytes + len(data)
            while self._bytes > self.max_bytes:
                oldest, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.nbytes + len(oldest)
        return tiles


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
