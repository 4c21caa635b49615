"""A picture as the demo keeps it: PNG bytes and the digest of its pixels."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image

from hovle_data.workers import default_workers, work

RENDER_SIZE = 112  # pixels; drawings are read well at 48 already
MANY = 1000  # drawings that take longer than starting a process to help


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


def render_pictures(
    drawings: Sequence[tuple[str, Path]], progress: Callable[[int, int], None] | None = None
) -> Iterator[Picture]:
    """SVGs on white, `RENDER_SIZE` pixels square, in order: each a key and a file. Many of them use all cores."""
    workers = default_workers() if len(drawings) >= MANY else 1
    for done, picture in enumerate(work(_render, None, drawings, workers), start=1):
        if progress:
            progress(done, len(drawings))
        yield picture


def _render(_: None, drawing: tuple[str, Path]) -> Picture:
    return render_picture(*drawing)


def render_picture(key: str, svg: Path) -> Picture:
    """An SVG file on white, as a PNG of `RENDER_SIZE` pixels square."""
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
