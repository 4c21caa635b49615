"""What a user gets wrong and is told: checkpoints that do not fit, pictures of other kinds, conversations."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROCESSOR = tiny_processor(TOKENIZER)
PICTURE = Image.new("RGB", (60, 60), (200, 30, 30))


@pytest.fixture
def saved(tmp_path):
    tiny_hovle(TOKENIZER).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def prompt():
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    encoded = PROCESSOR.encode([{"role": "user", "content": content}], [PICTURE], add_generation_prompt=True)
    return PROCESSOR.batch([encoded])


def test_a_tensor_too_few_or_too_many_is_named(saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks the tensor .*{name.rpartition('.')[2]}"):
        AutoModelForImageTextToText.from_pretrained(saved)
    save_file(tensors | {"foo": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="no place for, the tensor foo"):
        AutoModelForImageTextToText.from_pretrained(saved)
    save_file(tensors, file, {"format": "pt"})
    _, info = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]


def test_a_misshapen_tensor_is_named(saved):
    file = saved / "model.safetensors"
    name = "embedding.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    shape = list(tensors[name].shape)
    save_file(tensors | {name: torch.zeros(3, 5)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"{name} is [3, 5], expected {shape}")):
        AutoModelForImageTextToText.from_pretrained(saved)
    model, info = AutoModelForImageTextToText.from_pretrained(
        saved, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [found[0] for found in info["mismatched_keys"]] == [name]
    assert list(model.get_parameter(name).shape) == shape
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_pictures_of_16_bits_are_scaled_and_of_floats_refused():
    grey = Image.fromarray(np.full((60, 60), 257 * 40, np.uint16))
    assert (PROCESSOR.image_processor.tiles(grey) == 40).all()
    with pytest.raises(ValueError, match="no defined range"):
        PROCESSOR.image_processor.tiles(Image.fromarray(np.full((60, 60), 0.5, np.float32)))


@pytest.mark.parametrize("images", ["a.png", np.zeros((4, 4, 3)), torch.zeros(3, 4, 4), [["a.png"]]])
def test_what_is_no_picture_is_refused_by_its_type(images):
    with pytest.raises(ValueError, match="images must be PIL images"):
        PROCESSOR(text="<IMG_CONTEXT>hi", images=images)


def test_tiles_that_do_not_fit_are_refused_with_their_shape(prompt):
    model = tiny_hovle(TOKENIZER).eval()
    for wrong in (prompt["pixel_values"][:, :, :28], prompt["pixel_values"][0]):
        with pytest.raises(ValueError, match="pixel_values must be tiles"):
            model(**{**prompt, "pixel_values": wrong})
    twice = torch.cat([prompt["pixel_values"]] * 2)
    with pytest.raises(ValueError, match="image placeholders, but pixel_values hold"):
        model.generate(**{**prompt, "pixel_values": twice}, num_beams=2, max_new_tokens=2)


@pytest.mark.parametrize(
    "message",
    [{"content": "x"}, {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": ["hi"]},
     {"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": [{"type": "audio"}]}],
)  # fmt: skip
def test_a_malformed_message_is_named(message):
    with pytest.raises(ValueError, match="message 0 needs a role|content part"):
        PROCESSOR.encode([message], [], add_generation_prompt=True)


def test_a_role_becomes_no_picture():
    encoded = PROCESSOR.encode([{"role": "<IMG_CONTEXT>", "content": "x"}], [], add_generation_prompt=True)
    assert PROCESSOR.image_token_id not in encoded.input_ids
