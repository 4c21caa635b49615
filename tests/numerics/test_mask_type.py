"""`mask_type`: who sees whom in the embedding blocks."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from hovle_core import HovleForConditionalGeneration
from hovle_core.attention import PACKED_ATTENTION
from hovle_core.config import HolisticEmbeddingConfig
from hovle_core.fusion import number_images
from hovle_core.testing import tiny_hovle, tiny_tokenizer

LOCATIONS = ("pre", "post")
IMPLEMENTATIONS = (PACKED_ATTENTION, "sdpa", "eager")
# Two samples in one row: text, an image of two tiles, text, an image of one | an image of one, text. 4 tokens a tile.
LENGTHS = (3 + 8 + 2 + 4, 4 + 2)
IMAGES = [range(3, 11), range(13, 17), range(17, 21)]  # where they lie
LAST_TILE = [1, 2, 3]  # of each image, in pixel_values


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def batch(model, packed=True):
    """The row above, or its first sample alone."""
    ids = torch.arange(3, 3 + sum(LENGTHS))
    for image in IMAGES:
        ids[list(image)] = model.config.image_token_id
    length = sum(LENGTHS) if packed else LENGTHS[0]
    side = model.config.embedding_config.image_size
    pixels = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids[None, :length],
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None, :length],
        "pixel_values": pixels if packed else pixels[:3],
    }


def changed_tokens(model, inputs, tile):
    """Positions whose embedding changes with the last patch of a tile."""
    pixels = inputs["pixel_values"].clone()
    pixels[tile, :, -14:, -14:] += 1.0
    with torch.no_grad():
        before, after = model.embed(**inputs), model.embed(**{**inputs, "pixel_values": pixels})
    return (before - after).abs().amax(-1)[0].gt(1e-6).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_of_an_image_see_each_other_and_no_other_image(tokenizer, implementation, location):
    model = tiny_hovle(tokenizer, mask_type="image_bidirectional", pixel_shuffle_loc=location)
    model.set_attn_implementation(implementation)
    for packed in (True, False):
        inputs = batch(model, packed)
        ends = (LENGTHS[0], LENGTHS[0], sum(LENGTHS))
        for image, tile, end in list(zip(IMAGES, LAST_TILE, ends, strict=True))[: 3 if packed else 2]:
            # The whole image, and causally what comes after it in its sample: nothing before, no other sample.
            assert changed_tokens(model, inputs, tile) == list(range(image.start, end))


def test_causal_images_see_only_back(tokenizer):
    """The control: the last patch of a tile reaches its own token and what follows."""
    model = tiny_hovle(tokenizer)
    assert changed_tokens(model, batch(model), 1) == list(range(IMAGES[0].stop - 1, LENGTHS[0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_an_image_is_causal(tokenizer, implementation):
    """Images of 28 pixels have a single token, which has nobody to look ahead to."""
    models = [
        tiny_hovle(tokenizer, image_size=28, mask_type=name) for name in ("causal", "image_bidirectional")
    ]
    image = models[0].config.image_token_id
    inputs = {
        "input_ids": torch.tensor([[5, image, 6, image, 7, 8, 9, image, 4]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]),
        "pixel_values": torch.randn(3, 3, 28, 28),
    }
    for model in models:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        causal, bidirectional = (model(**inputs).logits for model in models)
    torch.testing.assert_close(bidirectional, causal, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("location", ["pre", "post"])
@pytest.mark.parametrize("mask_type", ["causal", "image_bidirectional"])
def test_an_image_behind_a_cache_equals_one_forward(tokenizer, location, mask_type):
    """A second turn with a picture of its own, as chats have them."""
    model = tiny_hovle(tokenizer, mask_type=mask_type, pixel_shuffle_loc=location)
    whole = batch(model, packed=False)
    ids, pixels = whole["input_ids"], whole["pixel_values"]
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        first = model(input_ids=ids[:, :12], pixel_values=pixels[:2], use_cache=True)
        second = model(input_ids=ids[:, 12:], pixel_values=pixels[2:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, atol=1e-5, rtol=1e-5)


def test_padded_rows_behind_an_hd_cache_are_refused(tokenizer):
    """How far each row's pictures expand is not known there; without an error they would be put in the wrong places."""
    model = tiny_hovle(tokenizer, pixel_shuffle_loc="post")
    whole = batch(model, packed=False)
    ids, pixels = whole["input_ids"][:, 12:], whole["pixel_values"][2:]
    first = model(input_ids=torch.ones(2, 3, dtype=torch.long), use_cache=True)
    unlike = torch.cat([ids, torch.full_like(ids, 7)])  # a picture in one row only
    with pytest.raises(ValueError, match="rows are padded behind a HoVLE-HD cache"):
        model(input_ids=unlike, pixel_values=pixels, past_key_values=first.past_key_values)
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="rows are padded behind a HoVLE-HD cache"):
        model(input_ids=torch.full((2, 1), 7), attention_mask=mask, past_key_values=first.past_key_values)


def test_rows_whose_cached_pictures_differ_in_number_are_refused(tokenizer):
    """Without padding for the LLM there is padding for the blocks, which no mask tells; alike rows go on."""
    model = tiny_hovle(tokenizer, pixel_shuffle_loc="post")
    whole = batch(model, packed=False)
    picture, pixels = whole["input_ids"], whole["pixel_values"]
    text = torch.arange(30, 30 + picture.shape[1])[None]
    for row, tiles, refused in ((text, pixels, True), (picture, torch.cat([pixels, pixels]), False)):
        ids, more = torch.cat([picture, row]), torch.tensor([[9, 10], [11, 12]])
        with torch.no_grad():
            expected = model(input_ids=torch.cat([ids, more], 1), pixel_values=tiles).logits[:, -2:]
            cache = model(input_ids=ids, pixel_values=tiles, use_cache=True).past_key_values
            if refused:
                with pytest.raises(ValueError, match="rows are padded behind a HoVLE-HD cache"):
                    model(input_ids=more, past_key_values=cache)
                rest = {"attention_mask": torch.ones(2, ids.shape[1] + 2), "past_key_values": cache}
                with pytest.raises(ValueError, match="rows are padded behind a HoVLE-HD cache"):
                    model.generate(more, **rest, max_new_tokens=1)
            else:
                out = model(input_ids=more, past_key_values=cache).logits
                torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_images_are_numbered_by_runs_and_samples():
    is_image = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    assert number_images(is_image, positions, past=2).tolist() == [[-1, -1, -1, 0, 0, -1, 1, 2, 2, -1]]


def test_what_cannot_mask_says_so(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="mask_type must be one of .*got 'bidirectional'"):
        HolisticEmbeddingConfig(mask_type="bidirectional")
    model = tiny_hovle(tokenizer, mask_type="image_bidirectional")
    model.save_pretrained(tmp_path)
    model = HovleForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.embedding_config.mask_type == "image_bidirectional"
    inputs = batch(model)
    # flash-attn itself needs CUDA; this stands for whatever transformers knows and we know no mask of.
    AttentionInterface.register("only_causal", sdpa_attention_forward)
    AttentionMaskInterface.register("only_causal", flash_attention_mask)
    model.set_attn_implementation("only_causal")
    with pytest.raises(ValueError, match="mask_type is 'image_bidirectional'.*'only_causal'.*choose one"):
        model(**inputs)
    # What the message advises works: the blocks with one implementation, the LLM with another.
    model.set_attn_implementation({"embedding_config": "sdpa", "text_config": "only_causal"})
    assert model(**inputs).logits.isfinite().all()
    model.set_attn_implementation("sdpa")
    ready = torch.ones(1, 1, sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)
    with pytest.raises(ValueError, match="mask_type.*ready-made"):
        model(**inputs, attention_mask=ready)
