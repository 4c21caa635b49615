"""`generate` where the text embedding is more than a table in memory: offloaded, or with an adapter on it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText

from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
STATIC = {"cache_implementation": "static", "disable_compile": True}
ON_CPU = ("embedding.patch_embed", "embedding.layers", "embedding.pixel_shuffle_proj", "embedding.rotary_emb")
DEVICES = {
    "embed_tokens": {"embedding.embed_tokens": "disk", "language_model": "cpu"}
    | dict.fromkeys(ON_CPU, "cpu"),
    "all": {"": "disk"},
}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_tokenizer(), max_tiles=2)


@pytest.fixture(scope="module")
def inputs(processor):
    """Two prompts, one of them padded and without a picture."""
    content = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    picture = Image.radial_gradient("L").convert("RGB")
    prompts = [
        processor.encode([{"role": "user", "content": content}], [picture], add_generation_prompt=True),
        processor.encode([{"role": "user", "content": "a red"}], add_generation_prompt=True),
    ]
    return processor.batch(prompts)


def as_embeds(model, inputs):
    return {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])} | {
        name: x for name, x in inputs.items() if name != "input_ids"
    }


@pytest.fixture(scope="module", params=["pre", "post"])
def model(request, processor):
    return tiny_hovle(processor.tokenizer, pixel_shuffle_loc=request.param)


@pytest.mark.parametrize("devices", DEVICES)
def test_an_offloaded_embedding(model, inputs, devices, tmp_path):
    """Static caches and inputs_embeds ask the module, whose weight is brought in only while it runs."""
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=DEVICES[devices], offload_folder=tmp_path / "offload"
    )
    assert offloaded.embedding.embed_tokens.weight.device.type == "meta"
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(offloaded.generate(**inputs, **GREEDY, **STATIC), expected)
    new = expected[:, -GREEDY["max_new_tokens"] :]
    embeds = as_embeds(model, inputs)
    for cache in ({}, STATIC):
        assert torch.equal(offloaded.generate(**embeds, **GREEDY, **cache), new)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_text_embedding(processor, inputs, dora):
    """Placeholders are known by what the adapted embedding gives, also where its product was rounded otherwise."""
    for location in ("pre", "post"):
        config = LoraConfig(
            r=16, target_modules=r"embedding\.embed_tokens", init_lora_weights=False, use_dora=dora
        )
        adapted = get_peft_model(tiny_hovle(processor.tokenizer, pixel_shuffle_loc=location), config).eval()
        new = adapted.generate(**inputs, **GREEDY)[:, -GREEDY["max_new_tokens"] :]
        for cache in ({}, STATIC):
            assert torch.equal(adapted.generate(**as_embeds(adapted, inputs), **GREEDY, **cache), new)
        one_by_one = as_embeds(adapted, inputs)
        tokens = [adapted.get_input_embeddings()(token) for token in inputs["input_ids"].flatten()[:, None]]
        one_by_one["inputs_embeds"] = torch.stack(tokens).view_as(one_by_one["inputs_embeds"])
        assert torch.equal(adapted.generate(**one_by_one, **GREEDY), new)


def test_every_row_may_have_its_own_adapter(processor, inputs):
    config = LoraConfig(r=4, target_modules=r"embedding\.embed_tokens", init_lora_weights=False)
    adapted = get_peft_model(tiny_hovle(processor.tokenizer), config).eval()
    adapted.add_adapter("other", config)
    model, ids = adapted.base_model.model, inputs["input_ids"]
    ids = torch.cat([ids[:1], ids[:1]])
    with adapted._enable_peft_forward_hooks(adapter_names=["default", "other"]):
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model._is_image(embeds), model._is_image(ids))
    assert not torch.allclose(embeds[0], embeds[1])
