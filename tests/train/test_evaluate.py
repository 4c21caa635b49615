"""What evaluations are made of agrees with plain computations."""

import math

import pytest
import torch
from PIL import Image

from hovle_core.processor import Encoded
from hovle_core.testing import GridTeacher, tiny_hovle, tiny_llm, tiny_processor
from hovle_train import evaluate
from hovle_train.features import TeacherFeatures
from hovle_train.loop import Trainer
from hovle_train.runtime import Runtime


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(processor):
    model = tiny_hovle(processor.tokenizer)
    model.set_attn_implementation("hovle_packed")
    return model


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(evaluate, "resolve_precision", lambda precision, device: torch.float32)


def ask(processor, text, answer=None, colour=None):
    parts = [] if colour is None else [{"type": "image"}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    images = [] if colour is None else [Image.new("RGB", (56, 56), colour)]
    return processor.encode(messages, images, add_generation_prompt=answer is None)


def test_target_losses_are_those_of_each_sample_alone(model, processor):
    samples = [
        ask(processor, "what is this?", "a red square", "red"),
        ask(processor, "hm", "no"),
        ask(processor, "x", "yes it is", "blue"),
    ]
    together = evaluate.target_losses(model, processor, samples)
    for sample, (loss, count) in zip(samples, together, strict=True):
        inputs = processor.batch([sample])
        labels = torch.from_numpy(sample.labels)[None]
        with torch.no_grad():
            mean = model(**inputs, labels=labels).loss
        assert count == int((sample.labels[1:] != -100).sum())
        assert loss / count == pytest.approx(float(mean), rel=1e-4)


def test_answers_are_those_of_generate_in_order(model, processor):
    prompts = [
        ask(processor, "a longer question than the others", colour="red"),
        ask(processor, "b"),
        ask(processor, "c?", colour="blue"),
    ]
    together = evaluate.answers(model, processor, prompts, max_new_tokens=5, batch_size=2)
    for prompt, text in zip(prompts, together, strict=True):
        out = model.generate(**processor.batch([prompt]), max_new_tokens=5, do_sample=False)
        assert (
            processor.tokenizer.decode(out[0, len(prompt.input_ids) :], skip_special_tokens=True).strip()
            == text
        )


def test_perplexity_of_a_bare_llm_and_of_a_fresh_hovle_agree(processor):
    from hovle_core import HovleForConditionalGeneration
    from hovle_core.testing import tiny_embedding_config

    llm = tiny_llm(len(processor.tokenizer)).eval()
    fresh = HovleForConditionalGeneration.from_language_model(
        llm, tiny_embedding_config(len(processor.tokenizer)), processor.image_token_id
    )
    for m in (llm, fresh):
        m.set_attn_implementation("hovle_packed")
    texts = ["a red square", "a blue circle is here", "what"]
    value = evaluate.perplexity(llm, processor, texts)
    assert value == pytest.approx(evaluate.perplexity(fresh, processor, texts), rel=1e-4)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.from_numpy(processor.encode_text(text).input_ids)[None]
        with torch.no_grad():
            total += float(llm(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert evaluate.text_cosine(fresh, processor, texts) == pytest.approx(1.0, abs=1e-5)


def test_rank_of_first():
    assert evaluate.rank_of_first([(1.0, 2), (0.9, 1), (4.0, 2)]) == 0
    assert evaluate.rank_of_first([(1.0, 1), (0.9, 1), (4.0, 8)]) == 2
    assert evaluate.rank_of_first([(1.0, 1), (1.0, 1)]) == 1, "a tie is no hit"
    with pytest.raises(ValueError, match="not finite"):
        evaluate.rank_of_first([(math.nan, 1), (1.0, 1)])


def test_image_cosine_is_what_distillation_logged(make_recipe, plugins):
    """On the training pictures of a finished run, evaluation and training see the same cosine."""
    from hovle_core import HovleForConditionalGeneration, HovleProcessor
    from hovle_data.decode import decode_image
    from hovle_data.shards import ShardSource

    recipe = make_recipe("distillation", train={"steps": 30}, optim={"lr": 1e-2})
    Trainer(recipe, plugins, Runtime()).run()
    final = recipe.path / "final"
    model = HovleForConditionalGeneration.from_pretrained(final)
    processor = HovleProcessor.from_pretrained(final)
    source = ShardSource(recipe.data.images[0].path)
    tiles = processor.image_processor.tiles(decode_image(source[0].images[0]))
    value = evaluate.image_cosine(model, processor, GridTeacher(), final, tiles)
    head, mean = evaluate.load_head(final)
    ids = torch.from_numpy(processor.encode_image(tiles).input_ids)[None]
    pixels = torch.from_numpy(tiles.copy()).permute(0, 3, 1, 2)
    with torch.no_grad():
        embedded = model.embed(ids, processor.image_processor.normalize(pixels))
        student = head(embedded[ids == processor.image_token_id])
        features = TeacherFeatures(GridTeacher(), processor.tokens_per_tile, centre=False)
        target = features.get([""], pixels).flatten(0, 1) - mean
        expected = torch.nn.functional.cosine_similarity(student, target, dim=-1).mean()
    assert value == pytest.approx(float(expected), abs=1e-4)
    assert value > 0.5


def test_long_texts_are_cut(model, processor):
    text = "a red square " * 100
    short = processor.encode_text(text)
    cut = Encoded(short.input_ids[:10], short.labels[:10], short.tiles)
    loss, count = evaluate.target_losses(model, processor, [cut])[0]
    assert evaluate.perplexity(model, processor, [text], max_tokens=10) == pytest.approx(
        math.exp(loss / count), rel=1e-5
    )


def test_a_text_may_be_longer_than_a_row(processor, monkeypatch):
    """`language.max_tokens` has no bound of its own."""
    llm, text = tiny_llm(len(processor.tokenizer)).eval(), "a red square " * 20
    whole = evaluate.perplexity(llm, processor, [text])
    monkeypatch.setattr(evaluate, "MAX_TOKENS", 16)
    assert len(processor.encode_text(text).input_ids) > 16
    assert evaluate.perplexity(llm, processor, [text]) == pytest.approx(whole, rel=1e-5)
