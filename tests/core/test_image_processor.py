"""Tiles that travel as uint8, and the fast mode: what it may change and what it may not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hovle_core import HovleImageProcessor, HovleProcessor
from hovle_core.images import ImageError
from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer


def photo(width, height):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return noise.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("size", [(56, 56), (97, 61), (500, 130), (61, 397), (1, 3)])
def test_tiles_are_pillows_resize_cut_up(size):
    processor, image = HovleImageProcessor(56, 1, 6), photo(*size)
    columns, rows = processor.grid(*size)
    whole = image.resize((columns * 56, rows * 56), Image.Resampling.BICUBIC)
    expected = [
        whole.crop((c * 56, r * 56, c * 56 + 56, r * 56 + 56)) for r in range(rows) for c in range(columns)
    ]
    if columns * rows > 1:
        expected.append(image.resize((56, 56), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(processor.tiles(image), np.stack([np.asarray(tile) for tile in expected]))
    np.testing.assert_array_equal(processor.tiles_of_file(png(image)), processor.tiles(image))


@pytest.mark.parametrize("fast", [False, True])
def test_tiles_lie_in_memory_as_models_want_them(fast):
    """Else every sample's megabytes are turned over once more on their way into a batch."""
    tiles = HovleImageProcessor(56, max_tiles=6, fast=fast).tiles(Image.new("RGB", (90, 60)))
    assert tiles.shape == (7, 56, 56, 3)
    assert tiles.transpose(0, 3, 1, 2).flags.c_contiguous


@pytest.mark.parametrize("location", ["pre", "post"])
def test_the_model_normalises_uint8_tiles_as_the_processor_does(location):
    tokenizer = tiny_tokenizer()
    model = tiny_hovle(tokenizer, pixel_shuffle_loc=location)
    here = tiny_processor(tokenizer)
    there = HovleProcessor(HovleImageProcessor(56, 1, 4, do_normalize=False), tokenizer, tokens_per_tile=4)
    arguments = {"images": [photo(112, 56)], "text": "what is <IMG_CONTEXT>"}
    floats, bytes_ = here(**arguments), there(**arguments)
    assert (floats["pixel_values"].dtype, bytes_["pixel_values"].dtype) == (torch.float32, torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(**floats).logits, model(**bytes_).logits)
        assert torch.equal(
            model.generate(**floats, max_new_tokens=4), model.generate(**bytes_, max_new_tokens=4)
        )


def test_the_models_own_mean_and_std_count():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = tiny_hovle(tiny_tokenizer(), image_mean=mean, image_std=std)
    processor = HovleImageProcessor(56, image_mean=mean, image_std=std)
    tiles = torch.from_numpy(processor.tiles(photo(56, 56))).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens = model.embedding.image_tokens(tiles)
        assert torch.equal(tokens, model.embedding.image_tokens(processor.normalize(tiles)))
        assert not torch.equal(tokens, model.embedding.image_tokens(HovleImageProcessor(56).normalize(tiles)))


@pytest.mark.parametrize(
    ("size", "mean"), [((300, 200), 1), ((640, 480), 2), ((90, 100), 1), ((1001, 250), 6)]
)
def test_fast_tiles_are_close(size, mean):
    """A quarter of 1001 x 250 pixels is 250.25 x 62.5: scaled decoding rounds up, which shifts by a part of a pixel."""
    exact, fast = HovleImageProcessor(56, 1, 6), HovleImageProcessor(56, 1, 6, fast=True)
    image = photo(*size)
    assert np.abs(fast.tiles(image).astype(int) - exact.tiles(image)).max() <= 3
    data = jpeg(image)
    difference = np.abs(fast.tiles_of_file(data).astype(int) - exact.tiles_of_file(data))
    assert difference.mean() < mean
    assert difference.shape == exact.tiles(image).shape


def test_fast_decoding_keeps_the_grid_of_the_whole_picture():
    """A tie between grids is decided by the number of pixels, which a scaled picture has fewer of."""
    processor = HovleImageProcessor(56, 1, 12, fast=True)
    data = jpeg(photo(448, 448))
    assert processor.grid(448, 448) != processor.grid(56, 56)
    assert len(processor.tiles_of_file(data)) == processor.num_tiles(448, 448)


def test_fast_mode_and_uint8_are_saved(tmp_path):
    HovleImageProcessor(56, fast=True, do_normalize=False).save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert (again.fast, again.do_normalize) == (True, False)


@pytest.mark.parametrize("fast", [True, False])
def test_a_file_that_is_no_picture_is_refused(fast):
    with pytest.raises(ImageError, match="not a known image format"):
        HovleImageProcessor(56, fast=fast).tiles_of_file(b"no picture")
