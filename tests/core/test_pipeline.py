"""`pipeline("image-text-to-text", ...)`, from a folder and from a model, gives what `generate` gives."""

import pytest
import torch
from PIL import Image
from transformers import pipeline

from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

RED, WIDE = Image.new("RGB", (56, 56), "red"), Image.radial_gradient("L").resize((112, 56)).convert("RGB")
GREEDY = {"do_sample": False, "eos_token_id": None}


def chat(text, *pictures):
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_tokenizer())


@pytest.fixture(scope="module")
def model(processor):
    model = tiny_hovle(processor.tokenizer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # large weights: otherwise one token is repeated whatever is asked
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.25, generator=generator)
    return model


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["folder", "model"])
def pipe(request, model, processor, folder):
    if request.param == "folder":
        return pipeline("image-text-to-text", model=str(folder), dtype=torch.float32)
    return pipeline("image-text-to-text", model=model, processor=processor)


def answer(model, processor, text, *pictures, new=6):
    messages = [
        {"role": "user", "content": [*({"type": "image"},) * len(pictures), {"type": "text", "text": text}]}
    ]
    inputs = processor.batch([processor.encode(messages, pictures, add_generation_prompt=True)])
    tokens = model.generate(**inputs, **GREEDY, max_new_tokens=new)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_chat_with_a_picture(pipe, model, processor):
    assert type(pipe.model).__name__ == "HovleForConditionalGeneration"
    messages = chat("what is this", WIDE)
    (out,) = pipe(text=messages, max_new_tokens=6, return_full_text=False, generate_kwargs=dict(GREEDY))
    expected = answer(model, processor, "what is this", WIDE)
    assert expected
    assert out["generated_text"] == expected
    (full,) = pipe(text=messages, max_new_tokens=6, generate_kwargs=dict(GREEDY))
    assert full["generated_text"][-1] == {"role": "assistant", "content": expected}


def test_many_chats(pipe, model, processor):
    chats = [chat("what is this", RED), chat("and these two", WIDE, RED), chat("no picture")]
    expected = [answer(model, processor, c[0]["content"][-1]["text"], *pictures)
                for c, pictures in zip(chats, [(RED,), (WIDE, RED), ()], strict=True)]  # fmt: skip
    outs = pipe(text=chats, max_new_tokens=6, return_full_text=False, generate_kwargs=dict(GREEDY))
    assert [out[0]["generated_text"] for out in outs] == expected
    options = {"max_new_tokens": 6, "return_full_text": False, "generate_kwargs": dict(GREEDY)}
    outs = pipe(text=chats[:2], batch_size=2, **options)
    assert [out[0]["generated_text"] for out in outs] == expected[:2]


def test_an_answer_that_was_begun_goes_on(pipe, processor):
    messages = [
        *chat("what is this", RED),
        {"role": "assistant", "content": [{"type": "text", "text": "a red"}]},
    ]
    (out,) = pipe(text=messages, max_new_tokens=4, generate_kwargs=dict(GREEDY))
    assert len(out["generated_text"]) == 2
    assert out["generated_text"][-1]["content"][0]["text"].startswith("a red")


def test_a_prompt_that_is_rendered_already(pipe, model, processor):
    prompt = processor.apply_chat_template(chat("what is this", RED), add_generation_prompt=True)
    (out,) = pipe(
        images=RED, text=prompt, max_new_tokens=6, return_full_text=False, generate_kwargs=dict(GREEDY)
    )
    assert out["generated_text"] == answer(model, processor, "what is this", RED)
