"""What must not change the result: packing, padding, the cache, the attention implementation."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from hovle_core.attention import (
    LONGEST_GROUPED_SAMPLE,
    PACKED_ATTENTION,
    Packing,
    _grouped_attention,
    check_packing,
)
from hovle_core.losses import next_token_loss
from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

IMPLEMENTATIONS = (PACKED_ATTENTION, "sdpa", "eager")
LOCATIONS = ("pre", "post")
MASK_TYPES = ("causal", "image_bidirectional")


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


def outputs_and_gradients(model, rows):
    """Logits of all rows side by side, and the gradients of their summed loss."""
    model.zero_grad()
    logits = torch.cat([model(**inputs).logits.flatten(0, 1) for inputs, _ in rows])
    sum(next_token_loss(model, inputs, labels) for inputs, labels in rows).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | gradients


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_equals_unpacked(tokenizer, processor, samples, implementation, location, mask_type):
    """One row whose position_ids restart is each sample alone: outputs and gradients, pictures on both sides of a
    border included."""
    model = tiny_hovle(tokenizer, pixel_shuffle_loc=location, mask_type=mask_type)
    model.set_attn_implementation(implementation)
    packed = outputs_and_gradients(model, [inputs_of(samples, processor)])
    alone = outputs_and_gradients(model, [inputs_of([sample], processor) for sample in samples])
    assert packed.keys() == alone.keys()
    for name in packed:
        torch.testing.assert_close(
            packed[name], alone[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_packed_rows_equal_each_sample_alone(tokenizer, implementation):
    model = tiny_hovle(tokenizer)
    model.set_attn_implementation(implementation)
    ids, positions = torch.randint(3, 200, (2, 12)), torch.tensor([[*range(5), *range(7)], [*range(12)]])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions).logits
        alone = [model(input_ids=row).logits[0] for row in (ids[:1, :5], ids[:1, 5:], ids[1:])]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_equals_unpacked_behind_a_sliding_window(tokenizer, implementation):
    llm = MistralForCausalLM(
        MistralConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4,
        )
    ).eval()  # fmt: skip
    llm.set_attn_implementation(implementation)
    ids, lengths = torch.randint(3, 200, (1, 23)), (9, 3, 11)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = llm(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([llm(input_ids=part).logits[0] for part in ids.split(lengths, dim=1)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("location", LOCATIONS)
def test_flash_attention_is_told_of_packed_samples(tokenizer, processor, samples, location):
    """What transformers hands its flash function in both stacks makes the varlen kernel see the right samples.

    flash-attn needs CUDA: here a recorder stands behind transformers' interface with flash attention's own mask
    function, cuts the row by the `cu_seqlens` that transformers derives from what came, and attends to each piece.
    """
    seen = []

    def recorder(module, query, key, value, attention_mask, *, position_ids, scaling, **kwargs):
        (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids)
        lengths = starts.diff().tolist()
        assert attention_mask is None
        assert longest == max(lengths)
        seen.append(lengths)
        pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        out = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            for q, k, v in pieces
        ]
        return torch.cat(out, dim=2).transpose(1, 2), None

    AttentionInterface.register("varlen_recorder", recorder)
    AttentionMaskInterface.register("varlen_recorder", flash_attention_mask)
    model = tiny_hovle(tokenizer, pixel_shuffle_loc=location)
    inputs, _ = inputs_of(samples, processor)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("varlen_recorder")
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    lengths = [len(sample.labels) for sample in samples]
    wide = [
        n + (3 * 4 * len(sample.tiles) if location == "post" else 0)
        for n, sample in zip(lengths, samples, strict=True)
    ]
    assert seen == [wide, wide, lengths, lengths]


def test_flash_attention_takes_one_packed_row():
    rows = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    check_packing(rows, None, False, ("sdpa", "eager"))
    check_packing(rows[1:], None, False, ("flash_attention_2", "flash_attention_2"))
    with pytest.raises(ValueError, match="2 packed rows.*'flash_attention_2'.*one row"):
        check_packing(rows, None, False, ("sdpa", "flash_attention_2"))


@pytest.mark.slow
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_flex_attention_equals_sdpa_on_packed_samples(tokenizer, processor, samples, mask_type):
    """Forward only: flex attention has no backward on CPUs, and refuses weights that would need one."""
    model = tiny_hovle(tokenizer, mask_type=mask_type).requires_grad_(False)
    inputs, _ = inputs_of(samples, processor)
    expected = model(**inputs).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_packed_samples_cannot_see_each_other(tokenizer, processor, samples):
    """The control of the test above: without restarting positions the result differs."""
    model = tiny_hovle(tokenizer)
    inputs, labels = inputs_of(samples, processor)
    with torch.no_grad():
        right = next_token_loss(model, inputs, labels)
        wrong = next_token_loss(model, {**inputs, "position_ids": None}, labels)
    assert abs(right - wrong) > 1e-3


@pytest.mark.parametrize("length", [8, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_groups_attend_in_their_own_precision(dtype, tolerance, length):
    """Short groups go through float32 on a CPU, which must not round float64."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, length, 16, dtype=torch.float64).to(dtype)
    out = _grouped_attention(q, k, v, None, 0.25, 0.0)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=0.25)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


def test_packing_covers_every_token_once_and_long_samples_stand_alone():
    lengths = [3, LONGEST_GROUPED_SAMPLE + 50, 40, 38, LONGEST_GROUPED_SAMPLE + 60, 1, 39]
    positions = torch.cat([torch.arange(n) for n in lengths])
    sample = (positions == 0).cumsum(0)
    packing = Packing.from_mask_function(
        lambda b, h, q, k: (k <= q) & (sample[q] == sample[k]), sum(lengths), None, "cpu"
    )
    assert torch.equal(packing.tokens[packing.slots], torch.arange(sum(lengths)))
    assert len(packing.slots.unique()) == sum(lengths)
    rows = sum(group.rows for group in packing.groups)
    assert len(packing.tokens) == rows
    assert sorted([*packing.slots.tolist(), *packing.padding.tolist()]) == list(range(rows))
    assert sorted(n for group in packing.groups for n in [group.num_samples] if group.length > 100) == [1, 1]
    assert {(group.num_samples, group.length) for group in packing.groups} >= {(3, 40)}
    assert all(group.mask is None for group in packing.groups)
    assert Packing.from_mask_function(lambda b, h, q, k: k <= q, 9, None, "cpu") is None


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("location", LOCATIONS)
def test_cached_equals_uncached_generation(tokenizer, processor, location, mask_type):
    model = tiny_hovle(tokenizer, pixel_shuffle_loc=location, mask_type=mask_type)
    inputs = processor.batch([conversation(processor, "what is this", None, (112, 56))])
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, **options)
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 10
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padded_batch_equals_each_alone(tokenizer, processor, implementation, location, mask_type):
    """Prompts of unlike length, with two, one and no pictures, padded on the left."""
    model = tiny_hovle(tokenizer, pixel_shuffle_loc=location, mask_type=mask_type)
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


def test_packed_rows_refuse_a_cache_and_a_mask(tokenizer, processor, samples):
    model = tiny_hovle(tokenizer)
    inputs, _ = inputs_of(samples, processor)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**inputs, use_cache=True)
    with pytest.raises(ValueError, match="attention_mask is given: leave it out"):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    starts = torch.tensor([0, 5, inputs["input_ids"].shape[1]])
    with pytest.raises(ValueError, match="cu_seq_lens_q is given without position_ids"):
        model(inputs["input_ids"], inputs["pixel_values"], cu_seq_lens_q=starts, cu_seq_lens_k=starts)


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
