"""A picture as the demo keeps it: PNG bytes and the digest of its pixels."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image

RENDER_SIZE = 112  # pixels; drawings are read well at 48 already


@dataclass(frozen=True)
class Picture:
    """`key` names the picture in shards and in meta; `pixels` is the sha256 of size and RGB values."""

    key: str
    png: bytes
    pixels: str


def pixel_digest(image: Image.Image) -> str:
    """Two pictures that look the same have the same digest, however their files were compressed."""
    rgb = image.convert("RGB")
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()


def read_picture(key: str, path: Path) -> Picture:
    """A PNG file as it is."""
    png = path.read_bytes()
    with Image.open(io.BytesIO(png)) as image:
        return Picture(key, png, pixel_digest(image))


def render_picture(key: str, svg: Path) -> Picture:
    """An SVG on white, `RENDER_SIZE` pixels square."""
    # dpi: sizes in points fail without it. background: transparent pixels would come out black.
    data = resvg_py.svg_to_bytes(
        svg_path=str(svg),
        width=RENDER_SIZE,
        height=RENDER_SIZE,
        dpi=96,
        background="#ffffff",
        skip_system_fonts=True,  # no drawing may depend on the fonts of this machine
    )
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    out = io.BytesIO()
    rgb.save(out, "PNG")
    return Picture(key, out.getvalue(), pixel_digest(rgb))
