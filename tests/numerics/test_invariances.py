"""What must not change the result: packing, padding, the cache, the attention implementation."""

import pytest
import torch
from PIL import Image

from hovle_core.attention import LONGEST_GROUPED_SAMPLE, PACKED_ATTENTION, Packing
from hovle_core.losses import next_token_loss
from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

IMPLEMENTATIONS = (PACKED_ATTENTION, "sdpa", "eager")
LOCATIONS = ("pre", "post")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def processor(tokenizer):
    return tiny_processor(tokenizer, max_tiles=2)


def conversation(processor, question, answer, *sizes):
    images = [Image.radial_gradient("L").resize(size).convert("RGB") for size in sizes]
    content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return processor.encode(messages, images, add_generation_prompt=answer is None)


@pytest.fixture(scope="module")
def samples(processor):
    return [
        conversation(processor, "what is this", "a red square", (56, 56)),
        conversation(processor, "no picture here", "blue"),
        conversation(processor, "two of them", "circle circle circle", (112, 56), (30, 80)),
        conversation(
            processor, "is this a long question, with many a word, so that lengths differ?", "a", (56, 56)
        ),
    ]


def inputs_of(samples, processor):
    """One packed row."""
    tiles = torch.cat([torch.from_numpy(s.tiles) for s in samples]).permute(0, 3, 1, 2)
    labels = torch.cat([torch.from_numpy(s.labels) for s in samples])
    starts = torch.tensor([0, *[len(s.labels) for s in samples]]).cumsum(0)[:-1]
    labels[starts] = -100
    return {
        "input_ids": torch.cat([torch.from_numpy(s.input_ids) for s in samples])[None],
        "position_ids": torch.cat([torch.arange(len(s.input_ids)) for s in samples])[None],
        "pixel_values": processor.image_processor.normalize(tiles) if len(tiles) else None,
    }, labels[None]


def loss_and_gradients(model, inputs_and_labels):
    model.zero_grad()
    loss = sum(next_token_loss(model, inputs, labels) for inputs, labels in inputs_and_labels)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_equals_unpacked(tokenizer, processor, samples, implementation, location):
    model = tiny_hovle(tokenizer, pixel_shuffle_loc=location)
    model.set_attn_implementation(implementation)
    packed_loss, packed = loss_and_gradients(model, [inputs_of(samples, processor)])
    loss, gradients = loss_and_gradients(model, [inputs_of([sample], processor) for sample in samples])
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    assert packed.keys() == gradients.keys()
    for name in packed:
        torch.testing.assert_close(
            packed[name], gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_packed_samples_cannot_see_each_other(tokenizer, processor, samples):
    """The control of the test above: without restarting positions the result differs."""
    model = tiny_hovle(tokenizer)
    inputs, labels = inputs_of(samples, processor)
    with torch.no_grad():
        right = next_token_loss(model, inputs, labels)
        wrong = next_token_loss(model, {**inputs, "position_ids": None}, labels)
    assert abs(right - wrong) > 1e-3


def test_packing_covers_every_token_once_and_long_samples_stand_alone():
    lengths = [3, LONGEST_GROUPED_SAMPLE + 50, 40, 38, LONGEST_GROUPED_SAMPLE + 60, 1, 39]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packing = Packing.from_position_ids(positions)
    assert packing.tokens.sort().values.tolist() == list(range(sum(lengths)))
    assert len(packing.slots.unique()) == sum(lengths)
    assert int(packing.slots.max()) < sum(group.rows for group in packing.groups)
    assert sorted(n for group in packing.groups for n in [group.num_samples] if group.length > 100) == [1, 1]
    assert {(group.num_samples, group.length) for group in packing.groups} >= {(3, 40)}
    assert Packing.from_position_ids(torch.arange(9)[None]) is None


@pytest.mark.parametrize("location", LOCATIONS)
def test_cached_equals_uncached_generation(tokenizer, processor, location):
    model = tiny_hovle(tokenizer, pixel_shuffle_loc=location)
    inputs = processor.batch([conversation(processor, "what is this", None, (112, 56))])
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, **options)
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 10
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padded_batch_equals_each_alone(tokenizer, processor, implementation, location):
    """Prompts of unlike length, with two, one and no pictures, padded on the left."""
    model = tiny_hovle(tokenizer, pixel_shuffle_loc=location)
    model.set_attn_implementation(implementation)
    prompts = [
        conversation(processor, "two of them and a long question too", None, (112, 56), (56, 56)),
        conversation(processor, "what", None, (56, 56)),
        conversation(processor, "text only", None),
    ]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options["return_dict_in_generate"] = True
    together = model.generate(**processor.batch(prompts), **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(**processor.batch([prompt]), **options)
        for step in range(8):
            torch.testing.assert_close(
                together.logits[step][row], alone.logits[step][0], atol=1e-4, rtol=1e-4
            )


def test_cache_gives_the_logits_of_recomputation(tokenizer, processor):
    model = tiny_hovle(tokenizer)
    ids = torch.randint(3, 200, (2, 20))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :12], use_cache=True)
        second = model(input_ids=ids[:, 12:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-4)


def test_packed_rows_refuse_a_cache(tokenizer, processor, samples):
    model = tiny_hovle(tokenizer)
    inputs, _ = inputs_of(samples, processor)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**inputs, use_cache=True)


def test_mismatch_names_both_counts(tokenizer, processor, samples):
    model = tiny_hovle(tokenizer)
    inputs, _ = inputs_of(samples[:1], processor)
    with pytest.raises(ValueError, match="4 image placeholders.*2 tiles of 4 tokens = 8"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    with pytest.raises(ValueError, match="4 image placeholders.*0 tiles"):
        model(**{**inputs, "pixel_values": None})


def test_new_embedding_hands_the_llm_its_own_text(tokenizer):
    """A HoVLE around an LLM starts as that LLM for text: its blocks' branches end in zeros."""
    from hovle_core import HovleForConditionalGeneration
    from hovle_core.testing import tiny_embedding_config, tiny_llm

    llm = tiny_llm(len(tokenizer)).eval()
    model = HovleForConditionalGeneration.from_language_model(
        llm, tiny_embedding_config(len(tokenizer)), 7
    ).eval()
    ids = torch.randint(8, 200, (2, 15))
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, llm(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("location", LOCATIONS)
def test_rescaling_scales_the_output_and_nothing_else(tokenizer, processor, samples, location):
    model = tiny_hovle(tokenizer, pixel_shuffle_loc=location)
    inputs, _ = inputs_of(samples, processor)
    with torch.no_grad():
        before = model.embed(**inputs)
        model.embedding.rescale_(0.25)
        torch.testing.assert_close(model.embed(**inputs), before * 0.25, atol=1e-5, rtol=1e-4)
