"""The one preprocessing: placeholders, targets, and text that cannot pose as a picture."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, PreTrainedTokenizerFast

from hovle_core import HovleProcessor
from hovle_core.image_processor import HovleImageProcessor
from hovle_core.images import ImageError
from hovle_core.processor import IGNORE_INDEX, IMAGE_CONTEXT, IMAGE_TOKENS, add_image_tokens
from hovle_core.testing import tiny_processor, tiny_tokenizer

RED = Image.new("RGB", (56, 56), "red")
WIDE = Image.new("RGB", (112, 56), "blue")  # two tiles and a thumbnail


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def user(text, pictures=1):
    return {"role": "user", "content": [*({"type": "image"},) * pictures, {"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": text}


def targets(processor, encoded):
    return processor.tokenizer.decode(encoded.labels[encoded.labels != IGNORE_INDEX])


def test_only_answers_are_targets_over_many_turns_and_pictures(processor):
    messages = [user("what is this"), assistant("a red square"), user("and this"), assistant("blue")]
    encoded = processor.encode(messages, [RED, WIDE])
    assert targets(processor, encoded) == "a red square<|im_end|>blue<|im_end|>"
    assert (encoded.input_ids == processor.image_token_id).sum() == (1 + 3) * processor.tokens_per_tile
    assert encoded.tiles.shape == (4, 56, 56, 3)
    assert encoded.tiles.dtype == np.uint8
    kept = encoded.labels != IGNORE_INDEX
    assert (encoded.labels[kept] == encoded.input_ids[kept]).all()


def test_prompt_is_a_prefix_of_the_training_sample(processor):
    """What generate sees is exactly what training saw before the answer."""
    prompt = processor.encode([user("what is this")], [RED], add_generation_prompt=True)
    whole = processor.encode([user("what is this"), assistant("a red square")], [RED])
    assert (whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids).all()
    assert whole.labels[len(prompt.input_ids)] != IGNORE_INDEX


@pytest.mark.parametrize("typed", ["<IMG_CONTEXT>", "<img>", "</img>", "<|im_end|>", "<|im_start|>system"])
def test_typed_special_tokens_stay_text(processor, typed):
    text = f"look at {typed} this"
    encoded = processor.encode([user(text), assistant(f"no {typed}")], [RED])
    assert (encoded.input_ids == processor.image_token_id).sum() == processor.tokens_per_tile
    assert text in processor.tokenizer.decode(encoded.input_ids)
    specials = [i for i in encoded.input_ids.tolist() if i in processor.tokenizer.all_special_ids]
    plain = processor.encode([user("look"), assistant("no")], [RED])
    assert specials == [i for i in plain.input_ids.tolist() if i in processor.tokenizer.all_special_ids]
    for one in (processor.encode_text(typed), processor.encode_pair(None, typed)):
        assert processor.image_token_id not in one.input_ids
    assert len(processor.encode_text(typed).input_ids) > 2


def test_pieces_read_before_are_read_anew_once_the_tokenizer_has_another_token():
    processor = tiny_processor(tiny_tokenizer())
    before = [processor.encode([user("zebra", 0), assistant("no")]).input_ids.tolist() for _ in range(2)]
    processor.tokenizer.add_tokens(["zebra"])
    after = processor.encode([user("zebra", 0), assistant("no")]).input_ids.tolist()
    assert before[0] == before[1]
    assert len(after) < len(before[0])
    assert processor.tokenizer.convert_tokens_to_ids("zebra") in after


@pytest.mark.parametrize("repeats", [3, 500])
def test_a_text_full_of_special_tokens_takes_few_calls_of_the_tokenizer(processor, monkeypatch, repeats):
    """A call takes longer than a token's name is long, and a server's other clients wait for it."""
    calls, tokenizer = [], processor.tokenizer
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, *a, **k: calls.append(1) or call(self, *a, **k)
    )
    typed = " ".join(f"x{i} <img> <|im_end|>" for i in range(repeats))
    encoded = processor.encode([{"role": "user", "content": typed}], add_generation_prompt=True)
    assert len(calls) < 32
    assert typed in tokenizer.decode(encoded.input_ids)
    special = set(tokenizer.convert_tokens_to_ids(["<img>", "<|im_end|>"]))
    # Those of the template alone: none of what was typed.
    plain = processor.encode([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert sum(i in special for i in encoded.input_ids) == sum(i in special for i in plain.input_ids)


def test_an_answer_may_come_first(processor):
    """As clients send a greeting."""
    greeting, question = {"role": "assistant", "content": "this is a"}, {"role": "user", "content": "red"}
    encoded = processor.encode([greeting, question], add_generation_prompt=True)
    decode = processor.tokenizer.decode
    assert decode(encoded.input_ids).startswith(
        "<|im_start|>assistant\nthis is a<|im_end|>\n<|im_start|>user\nred"
    )
    assert decode(encoded.input_ids[encoded.labels >= 0]) == "this is a<|im_end|>"


def test_text_that_looks_like_an_internal_mark_is_text(processor):
    text = "a [[picture 0123456789abcdef]] and [[literal 0123456789abcdef 0]]"
    encoded = processor.encode([user(text, pictures=0)], [])
    assert text in processor.tokenizer.decode(encoded.input_ids)


def test_images_and_parts_must_agree(processor):
    with pytest.raises(ValueError, match="2 image parts, but 1 images"):
        processor.encode([user("two", pictures=2)], [RED])
    with pytest.raises(ValueError, match="0 image parts, but 1 images"):
        processor.encode([{"role": "user", "content": "none"}], [RED])
    with pytest.raises(ValueError, match="part type 'video'"):
        processor.encode([{"role": "user", "content": [{"type": "video"}]}], [])


def test_a_template_that_rewrites_history_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        tiny_processor(tokenizer).encode([user("a", 0), assistant("b"), user("c", 0), assistant("d")])


def test_pairs_texts_and_pictures(processor):
    pair = processor.encode_pair(RED, "a red square")
    assert targets(processor, pair) == "a red square<|im_end|>"
    assert (pair.labels[: processor.tokens_per_tile + 3] == IGNORE_INDEX).all()
    text = processor.encode_text("a red square")
    assert (text.labels == text.input_ids).all()
    assert len(text.tiles) == 0
    assert len(processor.encode_image(WIDE).input_ids) == 3 * processor.tokens_per_tile + 2


def test_a_picture_its_file_and_its_tiles_are_the_same(processor):
    file = io.BytesIO()
    WIDE.save(file, "PNG")
    tiles = processor.image_processor.tiles(WIDE)
    for picture in (file.getvalue(), tiles):
        assert np.array_equal(processor.encode([user("look")], [picture]).tiles, tiles)
        assert np.array_equal(processor.encode_pair(picture, "a").tiles, tiles)
        assert np.array_equal(processor.encode_image(picture).tiles, tiles)
    with pytest.raises(ImageError, match="not a known image format"):
        processor.encode_image(b"no picture")


def test_batch_pads_on_the_left(processor):
    short, long = processor.encode([user("a")], [RED]), processor.encode([user("a longer one")], [WIDE])
    batch = processor.batch([short, long])
    pad = len(long.input_ids) - len(short.input_ids)
    assert batch["attention_mask"][0].tolist() == [0] * pad + [1] * len(short.input_ids)
    assert batch["pixel_values"].shape == (4, 3, 56, 56)
    assert "pixel_values" not in processor.batch([processor.encode_text("a")])


def test_call_expands_placeholders(processor):
    inputs = processor(images=[RED, WIDE], text=["see <IMG_CONTEXT> a", "<IMG_CONTEXT>"])
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 12]
    with pytest.raises(ValueError, match="1 <IMG_CONTEXT> placeholders for 2 images"):
        processor(images=[RED, RED], text="<IMG_CONTEXT>")
    nested = processor(images=[[RED], [WIDE]], text=["<IMG_CONTEXT> a", "<IMG_CONTEXT>"], padding=True)
    assert (nested["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 12]
    with pytest.raises(ValueError, match="unknown arguments.*truncation"):
        processor(text="a", truncation=True)
    with pytest.raises(ValueError, match="padding True"):
        processor(text="a", padding="max_length")


def with_picture(text, **source):
    return {"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": text}]}


def test_chat_template_is_encode_and_batch(processor, tmp_path):
    """transformers' door: pictures inside the messages, as objects or files."""
    WIDE.save(tmp_path / "wide.png")
    conversations = [
        [with_picture("a", image=RED)],
        [with_picture("a longer one", path=tmp_path / "wide.png")],
    ]
    expected = processor.batch(
        [
            processor.encode([user("a")], [RED], add_generation_prompt=True),
            processor.encode([user("a longer one")], [WIDE], add_generation_prompt=True),
        ]
    )
    options = {"add_generation_prompt": True, "tokenize": True}
    inputs = processor.apply_chat_template(conversations, return_dict=True, **options)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    alone = processor.apply_chat_template(conversations[1], **options)
    assert alone.tolist() == inputs["input_ids"][1:].tolist()

    text = processor.apply_chat_template(conversations[1], add_generation_prompt=True)
    assert text.count("<IMG_CONTEXT>") == 1
    assert processor(images=WIDE, text=text)["input_ids"].tolist() == alone.tolist()
    assert processor.apply_chat_template(conversations, add_generation_prompt=True)[1] == text


def test_chat_template_leaves_an_answer_open(processor):
    messages = [with_picture("what is this", image=RED), assistant("a red")]
    ids = processor.apply_chat_template(messages, continue_final_message=True, tokenize=True)[0].tolist()
    whole = processor.encode([user("what is this"), assistant("a red")], [RED]).input_ids.tolist()
    assert ids == whole[: len(ids)]
    assert processor.tokenizer.decode(ids).endswith("assistant\na red")


def test_chat_template_refuses_what_it_cannot_do(processor):
    with pytest.raises(ValueError, match="holds no picture; give"):
        processor.apply_chat_template([user("a")], tokenize=True)
    with pytest.raises(ValueError, match="spells the special token '<IMG_CONTEXT>'.*tokenize=True"):
        processor.apply_chat_template([user("see <IMG_CONTEXT>", 0)])
    with pytest.raises(ValueError, match="return_tensors"):
        processor.apply_chat_template([user("a", 0)], tokenize=True, return_tensors="np")
    with pytest.raises(ValueError, match="processor_kwargs {'max_length': 3}"):
        processor.apply_chat_template([user("a", 0)], tokenize=True, processor_kwargs={"max_length": 3})
    with pytest.raises(ValueError, match=r"cannot open image 'none\.png'"):
        processor.apply_chat_template([with_picture("a", image="none.png")], tokenize=True)


def test_chat_template_and_its_variables_are_the_callers(processor):
    template = "{{ prefix }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ids = processor.apply_chat_template([user("a", 0)], chat_template=template, prefix="what ", tokenize=True)
    assert processor.tokenizer.decode(ids[0]) == "what a"


def test_round_trip_through_auto_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, HovleProcessor)
    messages = [user("what is this"), assistant("a red square")]
    a, b = (p.encode(messages, [WIDE]) for p in (processor, again))
    assert (a.input_ids == b.input_ids).all()
    assert (a.labels == b.labels).all()
    assert (a.tiles == b.tiles).all()


def test_tokenizer_without_picture_tokens_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer.__class__.from_str(
        tiny_tokenizer().backend_tokenizer.to_str().replace("<IMG_CONTEXT>", "<OTHER>")
    ))  # fmt: skip
    with pytest.raises(ValueError, match="lacks \\['<IMG_CONTEXT>'\\]"):
        HovleProcessor(HovleImageProcessor(56), bare)


def test_picture_tokens_that_anyone_could_type_are_refused():
    """In the vocabulary, but as ordinary words: `<IMG_CONTEXT>` in a user's text would become a picture."""
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    plain.add_tokens(["a", "<img>", "</img>", "<IMG_CONTEXT>"])
    with pytest.raises(
        ValueError, match="ordinary text, so that a user could type a picture.*add_image_tokens"
    ):
        HovleProcessor(HovleImageProcessor(56), plain)
    assert add_image_tokens(plain) == 0
    assert set(IMAGE_TOKENS) <= set(plain.all_special_tokens)
    processor = HovleProcessor(HovleImageProcessor(56), plain)
    assert processor.image_token_id not in processor.text_ids("a <IMG_CONTEXT> a")


def test_typed_special_tokens_stay_text_while_other_threads_encode(processor):
    """`split_special_tokens` is a switch on the tokenizer: one thread must not turn it back under another."""
    typed = f"look {IMAGE_CONTEXT} there" * 20

    def encode(i):
        if i % 2:
            return processor.text_ids(typed)
        return processor.encode([user("what is this", 0), assistant("a red square")]).input_ids.tolist()

    alone = [encode(0), encode(1)]
    assert processor.image_token_id not in alone[1]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # what is rare in a day of training happens in a second
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(encode, range(1000)))
    finally:
        sys.setswitchinterval(interval)
    assert all(ids == alone[i % 2] for i, ids in enumerate(together))


def test_image_processor_call_and_errors():
    processor = HovleImageProcessor(56, 1, 4)
    out = processor([RED, WIDE])
    assert out["num_tiles"].tolist() == [1, 3]
    assert out["pixel_values"].shape == (4, 3, 56, 56)
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor(processor.image_mean)) / torch.tensor(
        processor.image_std
    )
    torch.testing.assert_close(out["pixel_values"][0, :, 0, 0], expected)
    with pytest.raises(ValueError, match="PIL images, got str"):
        processor(["cat.png"])
    with pytest.raises(ValueError, match="max_tiles"):
        HovleImageProcessor(56, 5, 4)
    with pytest.raises(ValueError, match="width 0"):
        processor.grid(0, 5)
