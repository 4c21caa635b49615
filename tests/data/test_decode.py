"""Pictures come out as a person sees them, or are refused with the reason."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from hovle_core.images import ImageError
from hovle_data.decode import TileCache, decode_image, image_suffix
from hovle_data.schema import BadSample


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def difference(a: Image.Image, b: Image.Image) -> float:
    assert a.size == b.size
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_common_formats_decode_and_sniff(encode_image_file, format):
    data = encode_image_file(gradient(), format)
    image = decode_image(data)
    assert image.mode == "RGB"
    assert difference(image, gradient()) < 6
    assert image_suffix(data) == {"JPEG": "jpg"}.get(format, format.lower())


def test_cmyk_looks_like_its_rgb(encode_image_file):
    data = encode_image_file(gradient().convert("CMYK"), "JPEG", quality=95)
    assert difference(decode_image(data), gradient()) < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_become_white(encode_image_file, mode):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 2))
    if mode == "PA":
        image = image.quantize(8)  # a palette with transparency, as GIF and small PNG files have
    else:
        image = image.convert(mode)
    pixels = np.asarray(decode_image(encode_image_file(image)))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 0).all()


def test_half_transparent_black_is_grey(encode_image_file):
    pixels = np.asarray(decode_image(encode_image_file(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))))
    assert (np.abs(pixels.astype(int) - 127) <= 1).all()


def test_palette_with_one_transparent_colour(encode_image_file):
    image = Image.new("P", (4, 1), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((3, 0), 1)
    pixels = np.asarray(decode_image(encode_image_file(image, transparency=0)))
    assert pixels[0].tolist() == [[255, 255, 255]] * 3 + [[0, 0, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(encode_image_file, orientation):
    upright = gradient()
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode_image_file(stored, "JPEG", quality=95, exif=exif.tobytes())
    assert difference(decode_image(data), upright) < 6


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(encode_image_file, format):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, 0)
    pixels = np.asarray(decode_image(encode_image_file(Image.fromarray(ramp), format)))
    assert pixels[0, :, 0].tolist() == list(range(256))


def test_32_bit_and_float_pixels_are_refused(encode_image_file):
    for array in (np.full((2, 2), 1 << 20, np.int32), np.full((2, 2), 0.5, np.float32)):
        with pytest.raises(BadSample, match="no defined range"):
            decode_image(encode_image_file(Image.fromarray(array), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(encode_image_file, format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    kwargs = {"lossless": True} if format == "WEBP" else {}
    data = encode_image_file(
        frames[0], format, save_all=True, append_images=frames[1:], duration=50, **kwargs
    )
    assert np.asarray(decode_image(data))[0, 0].tolist() == [255, 0, 0]


def test_wrong_suffix_does_not_matter(encode_image_file):
    assert (
        image_suffix(encode_image_file(gradient(), "JPEG")) == "jpg"
    )  # bytes decide, whatever the file is called


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image file"),
        (b"\0" * 100, "not a known image format"),
        (b"<svg></svg>", "not a known image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a known image format"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(data, reason):
    with pytest.raises(BadSample) as caught:
        decode_image(data, key="k1", source="a/shard-000000.tar")
    assert caught.value.reason.startswith(reason)
    assert "k1" in str(caught.value)
    assert "a/shard-000000.tar" in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(encode_image_file, format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encode_image_file(noise, format)
    for share in (0.3, 0.7):
        with pytest.raises(BadSample) as first:
            decode_image(data[: int(len(data) * share)])
        with pytest.raises(BadSample) as again:
            decode_image(data[: int(len(data) * share)])
        assert first.value.reason == again.value.reason


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP"])
def test_wherever_a_file_is_cut_no_half_picture_comes_out(encode_image_file, format):
    data = encode_image_file(gradient(), format)
    whole = np.asarray(decode_image(data))
    for cut in range(0, len(data), 7):
        try:
            image = decode_image(data[:cut])
        except BadSample:
            continue
        assert (np.asarray(image) == whole).all(), f"cut at {cut} of {len(data)}"


def huge_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 60_000])  # above our limit only, above Pillow's own
def test_decompression_bomb_is_refused_from_the_header(side):
    with pytest.raises(BadSample, match="image too large"):
        decode_image(huge_png(side, side))


def test_max_pixels_is_a_parameter(png):
    with pytest.raises(BadSample, match="6x4 pixels > max_pixels 23"):
        decode_image(png(), max_pixels=23)
    assert decode_image(png(), max_pixels=24).size == (6, 4)


def test_no_global_of_pillow_is_touched():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == (1024 * 1024 * 1024 // 4 // 3)
    assert "hovle_data.decode" in sys.modules


@settings(max_examples=150, deadline=None)
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_decode_or_are_bad_samples(data):
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    buffer = io.BytesIO()
    gradient(16, 16).convert("P" if format == "GIF" else "RGB").save(buffer, format)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content), max_pixels=1_000_000)
    except BadSample:
        return
    assert image.mode == "RGB"


class Cutter:
    """A processor that counts its pictures; a tile of 4 x 4 pixels is 48 bytes."""

    def __init__(self):
        self.cut = []

    def tiles(self, data):
        if data == b"broken":
            raise ImageError("not a known image format")
        self.cut.append(data)
        return np.full((1, 4, 4, 3), data[0], np.uint8)


def test_tiles_that_are_kept_are_cut_once_and_the_longest_unused_go_first():
    cutter = Cutter()
    cached = TileCache(cutter, max_bytes=2 * 49)  # two tiles with their one-byte files
    for data in (b"a", b"b", b"a", b"c", b"a", b"b"):
        assert (cached(data) == data[0]).all()
    assert cutter.cut == [b"a", b"b", b"c", b"b"]  # c pushed b out, whom a's second use had made the older
    with pytest.raises(ValueError, match="read-only"):
        cached(b"b")[:] = 0
    for _ in range(2):
        with pytest.raises(BadSample, match="not a known image format"):
            cached(b"broken")


def test_without_room_nothing_is_kept():
    cutter = Cutter()
    cached = TileCache(cutter, max_bytes=0)
    assert cached(b"a").flags.writeable
    cached(b"a")
    assert cutter.cut == [b"a", b"a"]
