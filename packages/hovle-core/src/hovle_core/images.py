"""Picture files as a person sees them: bytes -> upright RGB on white. The one decoding of train, chat and serve."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Pillow tries every format it knows, also ones that start other programs (EPS) or read other files; these do
# neither.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 89_000_000  # of one picture; about Pillow's own warning limit
STRIP_PIXELS = 2**21  # converted at a time
MAX_FILE_BYTES = 256 * 2**20  # of one file; the largest picture above, uncompressed


class ImageError(ValueError):
    """A picture that cannot be used. The message is "category" or "category: details"."""


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """Decode one picture to mode RGB.

    EXIF orientation is applied, transparency is laid on white, 16 bits are scaled to 8, palette and CMYK are
    converted, of an animation the first frame is taken; only the bytes are looked at, no name or suffix.
    `at_least`: (width, height) of the upright picture that suffice; a JPEG then comes at the smallest of 1, 1/2, 1/4
    and 1/8 of its size that covers them, which costs a fraction of decoding it whole.
    Everything that hinders this (zero bytes, not a picture, truncated, more than `max_pixels` by its header)
    raises `ImageError`.
    """
    with _opened(data, max_pixels) as image:
        if at_least is not None:
            image.draft(None, at_least[::-1] if _lies_on_its_side(image) else at_least)
        image.load()  # of an animation this is the first frame
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the upright picture, from its header alone. Raises as `decode_image`."""
    with _opened(data, max_pixels) as image:
        return image.size[::-1] if _lies_on_its_side(image) else image.size


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The picture, not decoded yet; whatever goes wrong with it in the block is an `ImageError`."""
    if not data:
        raise ImageError("empty image file")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:  # from the header: nothing is decoded yet
                raise ImageError(f"image too large: {width}x{height} pixels > max_pixels {max_pixels}")
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not a known image format: starts with {data[:8]!r}") from error
    except Image.DecompressionBombError as error:
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise ImageError(f"image too large: more than max_pixels {most}") from error
    except (
        Exception
    ) as error:  # on hostile bytes a decoder raises anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"image does not decode: {type(error).__name__}: {error}") from error


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether EXIF orientation exchanges width and height."""
    return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`decode_image` of a file. Raises `ImageError` naming the file and what is wrong with it."""
    try:
        with open(path, "rb") as file:  # a pipe is a file too: "<(curl ...)"
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ImageError(f"file too large: more than {MAX_FILE_BYTES >> 20} MiB")
        return decode_image(data, max_pixels=max_pixels)
    except OSError as error:
        raise ImageError(f"cannot open image {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:  # ImageError, or open's own about a name with a null byte
        raise ImageError(f"cannot open image {str(path)!r}: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with; naming another one is an error for every picture."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, transparent pixels on white; in strips, since some ways need many copies.

    Raises ValueError for modes whose pixels have no defined range.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    if rows >= height:
        return _strip_to_rgb(image)
    out = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        out.paste(_strip_to_rgb(strip), (0, top))
    return out


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save the picture with 8 or 16 bits")
    if image.mode == "La":  # premultiplied, which converts to LA only
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (Pillow's own conversion would clip it at 255)."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise ValueError("32-bit pixels have no defined range; save the picture with 8 or 16 bits")
    transparent = image.info.get("transparency")
    eight = (
        np.where(grey == transparent, 255, (grey + 128) // 257)
        if isinstance(transparent, int)
        else (grey + 128) // 257
    )
    return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
