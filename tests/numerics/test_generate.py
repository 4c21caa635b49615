"""`generate` in every mode gives what recomputation of each prompt alone gives (transformers' own search and sampling).

Prompts of unlike length with two, one and no pictures, one of them cut into three tiles, padded on the left.
"""

import functools

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache, TextIteratorStreamer

from hovle_core import HovleForConditionalGeneration
from hovle_core.cache import GrowingLayer
from hovle_core.testing import tiny_embedding_config, tiny_hovle, tiny_processor, tiny_tokenizer

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
BEAMS = GREEDY | {"num_beams": 3}
STATIC = {"cache_implementation": "static", "disable_compile": True}
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_tokenizer(), max_tiles=2)


def sharp(model):
    """Weights so large that what is generated hangs on every picture: freshly made models repeat one token."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "position" not in name:
                weight.normal_(std=0.35 if "patch" in name else 0.25, generator=generator)
    return model.eval()


@pytest.fixture(
    scope="module",
    params=["pre-causal", "pre-image_bidirectional", "post-causal", "post-image_bidirectional"],
)
def model(request, processor):
    location, mask_type = request.param.split("-")
    return sharp(tiny_hovle(processor.tokenizer, pixel_shuffle_loc=location, mask_type=mask_type))


@pytest.fixture(scope="module")
def prompts(processor):
    def prompt(text, *sizes):
        pictures = [Image.radial_gradient("L").resize(size).convert("RGB") for size in sizes]
        content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": text}]
        return processor.encode([{"role": "user", "content": content}], pictures, add_generation_prompt=True)

    return [
        prompt("two of them and a long question", (112, 56), (56, 30)),
        prompt("what", (56, 56)),
        prompt("text"),
    ]


@pytest.fixture(scope="module")
def batch(processor, prompts):
    return processor.batch(prompts)


@pytest.fixture(scope="module")
def expected(model, processor, prompts):
    """The oracle: each prompt alone, no cache. Tokens `[3, NEW]` and logits `[NEW, 3, V]`."""
    options = GREEDY | {"use_cache": False, "return_dict_in_generate": True, "output_logits": True}
    alone = [model.generate(**processor.batch([prompt]), **options) for prompt in prompts]
    logits = [torch.cat(step) for step in zip(*(out.logits for out in alone), strict=True)]
    return torch.cat([out.sequences[:, -NEW:] for out in alone]), torch.stack(logits)


def check(out, expected):
    tokens, logits = expected
    assert out.sequences[:, -NEW:].tolist() == tokens.tolist()
    torch.testing.assert_close(torch.stack(out.logits), logits, **TOLERANCE)


def with_logits(model, **inputs):
    return model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)


def as_embeds(model, batch):
    return {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])} | {
        name: value for name, value in batch.items() if name != "input_ids"
    }


@pytest.mark.parametrize("options", [{}, STATIC, {"use_cache": False}], ids=["dynamic", "static", "none"])
def test_a_padded_batch_equals_each_prompt_alone_without_cache(model, batch, expected, options):
    check(with_logits(model, **batch, **options), expected)


@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_inputs_embeds_equal_input_ids(model, batch, expected, options):
    check(with_logits(model, **as_embeds(model, batch), **options), expected)


def test_a_dynamic_cache_that_knows_no_config(model, batch, expected):
    """`DynamicCache()`, as users of other models make it."""
    check(with_logits(model, **batch, past_key_values=DynamicCache()), expected)
    cache = DynamicCache()
    model(**batch, past_key_values=cache)
    blocks_and_layers = len(model.embedding.layers) + len(model.language_model.model.layers)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * blocks_and_layers


@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_a_baseline_without_blocks(processor, batch, options):
    model = sharp(tiny_hovle(processor.tokenizer, num_hidden_layers=0))
    cached = model.generate(**batch, **GREEDY, **options)
    assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))


def test_a_static_cache_of_the_users_own(model, processor, prompts, expected):
    """HoVLE-HD's blocks need more room than `max_cache_len` tokens, and take it."""
    one = processor.batch(prompts[:1])
    cache = StaticCache(config=model.config, max_cache_len=one["input_ids"].shape[1] + NEW)
    out = model.generate(**one, **GREEDY, past_key_values=cache, disable_compile=True)
    assert out[0, -NEW:].tolist() == expected[0][0].tolist()


def test_the_static_decode_step_compiles_as_one_graph(processor, batch):
    """`fullgraph=True`: no break, no wait for the device; and no new graph while the text grows."""
    for location in ("pre", "post"):
        model = sharp(tiny_hovle(processor.tokenizer, pixel_shuffle_loc=location))
        eager, graphs, steps = model.forward, [], []

        def backend(graph, example_inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(eager, backend=backend, fullgraph=True)

        @functools.wraps(eager)
        def forward(*args, eager=eager, compiled=compiled, steps=steps, **kwargs):
            if kwargs["input_ids"].shape[1] > 1:
                return eager(*args, **kwargs)
            steps.append(None)
            return compiled(*args, **kwargs)

        options = GREEDY | STATIC | {"max_new_tokens": NEW}
        before = model.generate(**batch, **options)
        model.forward = forward
        assert torch.equal(model.generate(**batch, **options), before)
        assert len(steps) == NEW - 1
        assert len(graphs) == 1


@pytest.mark.parametrize("window", [None, 6])
def test_static_cache_of_an_llm_with_sliding_windows(processor, batch, window):
    """transformers then makes one mask a kind of layer; the blocks, which have no window, need their own."""
    V = len(processor.tokenizer)
    config = MistralConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, max_position_embeddings=512,
    )  # fmt: skip
    for location in ("pre", "post"):
        model = HovleForConditionalGeneration.from_language_model(
            MistralForCausalLM(config),
            tiny_embedding_config(V, pixel_shuffle_loc=location),
            processor.image_token_id,
        )
        sharp(model)
        expected = model.generate(**batch, **GREEDY, use_cache=False)
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
        assert torch.equal(model.generate(**batch, **GREEDY, **STATIC), expected)


def test_beams_with_and_without_cache_batched_and_alone(model, processor, prompts, batch):
    alone = torch.cat(
        [model.generate(**processor.batch([p]), **BEAMS, use_cache=False)[:, -NEW:] for p in prompts]
    )
    for options in ({}, STATIC, {"use_cache": False}):
        assert torch.equal(model.generate(**batch, **BEAMS, **options)[:, -NEW:], alone)
    assert torch.equal(model.generate(**as_embeds(model, batch), **BEAMS)[:, -NEW:], alone)


def test_what_is_generated_hangs_on_the_pictures(model, batch, expected):
    """Without this the tests here would say little."""
    other = model.generate(**batch | {"pixel_values": batch["pixel_values"].flip(0)}, **GREEDY)
    assert (other[:, -NEW:] != expected[0]).any(1).tolist() == [True, True, False]
    assert all(len(set(row.tolist())) > 2 for row in expected[0])


def test_sampling_is_the_same_with_every_cache(model, batch):
    options = GREEDY | {"do_sample": True, "num_return_sequences": 2, "top_k": 20}
    outs = []
    for more in ({}, STATIC, {"use_cache": False}):
        torch.manual_seed(3)
        outs.append(model.generate(**batch, **options, **more))
    assert outs[0].shape[0] == 6
    assert not torch.equal(outs[0][0], outs[0][1])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_streamer_gets_what_is_returned(model, processor, prompts, expected):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    model.generate(**processor.batch(prompts[:1]), **GREEDY, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(expected[0][0])


def test_assisted_and_prompt_lookup_decoding_change_nothing(model, processor, prompts, expected):
    """Both verify several tokens at once behind the cache and crop it, HoVLE-HD's longer layers included."""
    one = processor.batch(prompts[:1])
    assistant = tiny_hovle(processor.tokenizer, seed=1)
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(**one, **GREEDY, **options)[0, -NEW:].tolist() == expected[0][0].tolist()


def test_modes_that_transformers_moved_to_remote_code_say_so(model, processor, prompts):
    one = processor.batch(prompts[:1])
    for options in ({"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}):
        with pytest.raises(ValueError, match="trust_remote_code"):
            model.generate(**one, **GREEDY | options)


def test_another_turn_behind_the_cache(model, processor, prompts):
    """Text and pictures appended to a cached prompt: the logits of the whole at once."""
    first, second = (processor.batch([prompts[i]]) for i in (0, 1))
    whole = {
        name: torch.cat([first[name], second[name]], dim=0 if name == "pixel_values" else 1) for name in first
    }
    with torch.no_grad():
        expected = model(**whole).logits[:, -second["input_ids"].shape[1] :]
        cached = model(**first, use_cache=True).past_key_values
        out = model(**second | {"attention_mask": whole["attention_mask"]}, past_key_values=cached)
    torch.testing.assert_close(out.logits, expected, **TOLERANCE)


def test_a_padded_batch_goes_on_from_a_returned_cache(model, batch, expected):
    start = model.generate(**batch, **GREEDY | {"max_new_tokens": 3}, return_dict_in_generate=True)
    out = model.generate(
        start.sequences,
        attention_mask=torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(3, 3)], 1),
        past_key_values=start.past_key_values,
        **GREEDY | {"max_new_tokens": NEW - 3},
    )
    assert out[:, 3 - NEW :].tolist() == expected[0][:, 3:].tolist()


@pytest.mark.parametrize("given", ["ids", "new ids", "embeds", "new embeds"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pictures", [True, False])
def test_another_turn_of_a_chat(model, processor, prompts, static, given, pictures):
    """On the cache of the turn before, the whole prompt given or only what is not cached yet."""
    first, second = processor.batch(prompts[:1]), processor.batch([prompts[1 if pictures else 2]])
    options = GREEDY | {"max_new_tokens": 3, "disable_compile": True, "return_dict_in_generate": True}
    if static:
        options["past_key_values"] = StaticCache(config=model.config, max_cache_len=400)
    start = model.generate(**first, **options)
    ids = torch.cat([start.sequences, second["input_ids"]], 1)
    turns = [turn["pixel_values"] for turn in (first, second) if "pixel_values" in turn]
    rest = GREEDY | {"attention_mask": torch.ones_like(ids), "disable_compile": True}
    expected = model.generate(ids, **rest, pixel_values=torch.cat(turns), use_cache=False)[:, -NEW:]
    cached = start.sequences.shape[1] - 1  # the last token was returned and not yet read
    prompt = ids[:, cached:] if "new" in given else ids
    name = "inputs_embeds" if "embeds" in given else "input_ids"
    out = model.generate(
        **{name: model.get_input_embeddings()(prompt) if name == "inputs_embeds" else prompt},
        **rest,
        pixel_values=second.get("pixel_values"),
        past_key_values=start.past_key_values,
    )
    assert out[:, -NEW:].tolist() == expected.tolist()


def test_a_static_cache_that_was_reset_takes_any_prompt(processor, prompts):
    """HoVLE-HD's blocks need more room for two pictures than for none."""
    for location in ("pre", "post"):
        model = sharp(tiny_hovle(processor.tokenizer, pixel_shuffle_loc=location))
        inputs = [processor.batch([prompts[i]]) for i in (2, 1, 0, 1)]
        cache = StaticCache(config=model.config, max_cache_len=inputs[2]["input_ids"].shape[1] + NEW - 1)
        for one in inputs:
            out = model.generate(**one, **GREEDY, past_key_values=cache, disable_compile=True)
            assert torch.equal(out, model.generate(**one, **GREEDY, use_cache=False))
            cache.reset()


def test_a_cache_that_cannot_go_on_says_why(model, processor, prompts):
    first, second = (processor.batch([prompts[i]]) for i in (0, 1))
    length = first["input_ids"].shape[1]
    short = StaticCache(config=model.config, max_cache_len=length + 2)
    with pytest.raises(ValueError, match=f"static cache of {length + 2} tokens in the LLM, and this needs"):
        model.generate(**first, **GREEDY, past_key_values=short, disable_compile=True)
    with pytest.raises(ValueError, match=r"none is new: .*reset\(\)"):
        model.generate(**first, **GREEDY, past_key_values=short, disable_compile=True)
    cached = model(**first, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="none is new"):
        model.generate(**as_embeds(model, second), past_key_values=cached, **GREEDY)
    if model.config.embedding_config.pixel_shuffle_loc == "post":
        with torch.no_grad():
            room = length + second["input_ids"].shape[1]  # enough for the LLM
            both = StaticCache(config=model.config, max_cache_len=room)
            model(**first, past_key_values=both)
            with pytest.raises(ValueError, match="tokens in the embedding blocks, and HoVLE-HD needs"):
                model(**second, past_key_values=both)


def test_forward_needs_one_kind_of_input(model, batch):
    embeds = as_embeds(model, batch)["inputs_embeds"]
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="and not both"):
        model(**batch, inputs_embeds=embeds)


def test_return_dict_false_gives_tuples(model, batch):
    with torch.no_grad():
        logits, *_ = model(**batch, return_dict=False)
        torch.testing.assert_close(logits, model(**batch).logits)
