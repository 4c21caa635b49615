"""Picture files as a person sees them: bytes -> upright RGB on white."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hovle_data.schema import BadSample

# Pillow tries every format it knows, also ones that start other programs (EPS) or read other files; these do
# neither.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 89_000_000  # of one picture; about Pillow's own warning limit


def decode_image(
    data: bytes, *, key: str = "", source: str = "", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode one picture to mode RGB.

    EXIF orientation is applied, transparency is laid on white, 16 bits are scaled to 8, palette and CMYK are
    converted, of an animation the first frame is taken; the file's suffix is not looked at, only its bytes.
    Everything that hinders this (zero bytes, not a picture, truncated, more than `max_pixels` by its header)
    raises `BadSample` with key, source.
    """
    if not data:
        raise BadSample(key, source, "empty image file")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:  # from the header: nothing is decoded yet
                raise BadSample(
                    key, source, f"image too large: {width}x{height} pixels > max_pixels {max_pixels}"
                )
            image.load()  # of an animation this is the first frame
            return _flatten(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample(key, source, f"not a known image format: starts with {data[:8]!r}") from error
    except Image.DecompressionBombError as error:
        raise BadSample(key, source, f"image too large: {error}") from error
    except (
        Exception
    ) as error:  # on hostile bytes a decoder raises anything: OSError, SyntaxError, struct.error, ...
        raise BadSample(key, source, f"image does not decode: {type(error).__name__}: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with; naming another one is an error for every picture."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _flatten(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, transparent pixels on white."""
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
