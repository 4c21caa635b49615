"""Opening picture files; what decoding does to them is tested with the data package (tests/data/test_decode.py)."""

import io
import os
import threading

import numpy as np
import pytest
from PIL import Image

from hovle_core import images
from hovle_core.images import ImageError, decode_image, image_size, open_image


def test_a_picture_is_upright_and_on_white(tmp_path):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    opened = open_image(str(tmp_path / "a.png"))
    assert (opened.mode, opened.size) == ("RGB", (2, 4))
    assert opened.getpixel((1, 0)) == (255, 0, 0)
    assert opened.getpixel((0, 0)) == (255, 255, 255)


def test_a_pipe_is_a_file(tmp_path):
    Image.new("RGB", (3, 3), "blue").save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(
        target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "a.png").read_bytes())
    )
    writer.start()
    assert np.asarray(open_image(tmp_path / "pipe"))[0, 0].tolist() == [0, 0, 255]
    writer.join()


def test_failures_name_the_file_and_the_reason(tmp_path, monkeypatch):
    (tmp_path / "bad.png").write_bytes(b"GIF89a rubbish")
    (tmp_path / "empty.png").touch()
    (tmp_path / "big.png").write_bytes(b"\0" * 100)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 99)
    for name, reason in [
        ("none.png", "No such file or directory"),
        (".", "Is a directory"),
        ("bad.png", "image does not decode|not a known image format"),
        ("empty.png", "empty image file"),
        ("big.png", "file too large"),
        ("nul\0.png", "null byte"),
    ]:
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(f"{tmp_path}/{name}")
        assert repr(f"{tmp_path}/{name}") in str(caught.value)


@pytest.mark.parametrize("orientation", [None, 3, 6, 8])
@pytest.mark.parametrize("at_least", [(800, 600), (400, 300), (399, 299), (100, 75), (90, 75), (5, 5)])
def test_a_jpeg_is_decoded_no_larger_than_needed(orientation, at_least):
    """Down to an eighth, never below what is needed, upright, and the same picture."""
    width, height = (600, 800) if orientation in (6, 8) else (800, 600)
    upright = Image.radial_gradient("L").resize((800, 600)).convert("RGB")
    upright.paste("red", (0, 0, 200, 150))
    exif = Image.Exif()
    stored = upright
    if orientation is not None:
        exif[0x0112] = orientation
        back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        stored = upright.transpose(back[orientation])
    assert stored.size == (width, height)
    file = io.BytesIO()
    stored.save(file, "JPEG", exif=exif, quality=95)
    data = file.getvalue()
    assert image_size(data) == (800, 600)
    assert decode_image(data).size == (800, 600)
    scale = {(400, 300): 2, (399, 299): 2, (100, 75): 8, (90, 75): 8, (5, 5): 8}.get(at_least, 1)
    image = decode_image(data, at_least=at_least)
    assert image.size == (800 // scale, 600 // scale)
    expected = np.asarray(upright.reduce(scale) if scale > 1 else upright, np.float32)
    assert np.abs(np.asarray(image, np.float32) - expected).mean() < 3


def test_only_jpegs_are_scaled_and_headers_are_checked(tmp_path):
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert decode_image(data, at_least=(10, 10)).size == (80, 60)
    with pytest.raises(ImageError, match="too large: 80x60"):
        image_size(data, max_pixels=100)
    with pytest.raises(ImageError, match="not a known image format"):
        image_size(b"no picture")


MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "La", "RGBa", "CMYK", "YCbCr", "I;16", "I"]


@pytest.mark.parametrize(
    ("mode", "transparency"), [*((mode, None) for mode in MODES), ("L", 7), ("P", 7), ("I;16", 7)]
)
def test_a_large_picture_is_converted_in_strips_as_it_would_be_whole(monkeypatch, mode, transparency):
    rng = np.random.default_rng(0)
    colors = {"1": "L", "P": "RGB", "La": "LA", "RGBa": "RGBA", "I": "I;16"}.get(mode, mode)
    if colors == "I;16":
        picture = Image.fromarray(rng.integers(0, 2**16, (37, 23), dtype=np.uint16))
    else:
        values = rng.integers(0, 256, (37, 23 * len(Image.new(colors, (1, 1)).getbands())), dtype=np.uint8)
        picture = Image.frombytes(colors, (23, 37), values.tobytes())
    picture = picture if picture.mode == mode else picture.convert(mode)
    if transparency is not None:
        picture.info["transparency"] = transparency
    whole = images.to_rgb(picture)
    monkeypatch.setattr(images, "STRIP_PIXELS", 23 * 5)
    assert whole.mode == "RGB"
    assert images.to_rgb(picture).tobytes() == whole.tobytes()
