"""Our resizes against Pillow's own: whatever the shape, the exact one gives the same bytes."""

import errno
import random

import numpy as np
import pytest
from PIL import Image

from hovle_core import resize
from hovle_core.resize import BAND, resize_close, resize_exact, vertical_first


def noise(width, height, seed=0):
    """Every level next to every other: what sums beyond 255 and below 0 come from."""
    pixels = np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return Image.fromarray(pixels)


def pillow(image, size):
    """`[3, H, W]`"""
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@pytest.fixture
def always_compiled(monkeypatch):
    monkeypatch.setattr(resize, "SMALLEST_COMPILED", 0)


SHAPES = [
    ((640, 480), (1792, 1344)), ((61, 397), (112, 448)), ((500, 130), (56, 56)), ((97, BAND + 1), (97, 40)),
    ((97, BAND), (40, BAND)), ((1, 3), (56, 56)), ((300, 200), (1, 1)), ((7, 5), (7, 5)), ((1200, 9), (9, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), SHAPES)
def test_compiled_sums_are_pillows(always_compiled, source, target):
    image = noise(*source)
    np.testing.assert_array_equal(resize_exact(image, [target])[0], pillow(image, target))


def test_any_shape(always_compiled):
    """Half of them at the edge of the rule by which Pillow resizes columns first."""
    draw, first = random.Random(0), 0
    for i in range(300):
        (w, h), (W, H) = source, target = [
            (draw.randint(1, 150), draw.randint(1, 150)),
            (draw.randint(1, 90), draw.randint(1, 90)),
        ]
        if i % 2 and w > W:
            H = max(1, h - 2 * (w - W) + draw.choice((-1, 0, 1)))
            target = (W, H)
        first += vertical_first(source, target)
        image = noise(w, h, seed=i)
        np.testing.assert_array_equal(
            resize_exact(image, [target])[0], pillow(image, target), f"{source} {target}"
        )
    assert 30 < first < 270


def test_several_sizes_at_once_in_their_order(always_compiled):
    image, sizes = noise(200, 150), [(112, 84), (20, 3), (56, 56), (112, 84)]
    for size, pixels in zip(sizes, resize_exact(image, sizes), strict=True):
        np.testing.assert_array_equal(pixels, pillow(image, size))


def test_small_pictures_and_those_without_numba_are_left_to_pillow(monkeypatch):
    monkeypatch.setattr(resize, "_compiled", None)  # would fail if it were called
    image = noise(100, 100)
    np.testing.assert_array_equal(resize_exact(image, [(56, 56)])[0], pillow(image, (56, 56)))
    monkeypatch.setattr(resize, "_has_numba", lambda: False)
    image = noise(1200, 1000)
    np.testing.assert_array_equal(resize_exact(image, [(56, 56)])[0], pillow(image, (56, 56)))


def test_a_full_disk_for_numbas_cache_leaves_it_to_pillow(always_compiled, monkeypatch, caplog):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resize, "_compiled", full)
    image = noise(100, 100)
    np.testing.assert_array_equal(resize_exact(image, [(56, 56)])[0], pillow(image, (56, 56)))
    assert "NUMBA_CACHE_DIR" in caplog.text


def test_close_is_close():
    image = Image.radial_gradient("L").resize((300, 200)).convert("RGB")
    for size in ((448, 448), (56, 112)):
        assert np.abs(resize_close(image, [size])[0].astype(int) - pillow(image, size)).max() <= 2
