"""Opening picture files; what decoding does to them is tested with the data package (tests/data/test_decode.py)."""

import os
import threading

import numpy as np
import pytest
from PIL import Image

from hovle_core import images
from hovle_core.images import ImageError, open_image


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
