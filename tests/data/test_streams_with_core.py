"""The streams on the real `HovleProcessor`: its contract, from shards to packed batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hovle_core.image_processor import HovleImageProcessor
from hovle_core.processor import IGNORE_INDEX, HovleProcessor, add_image_tokens
from hovle_data import (
    ConversationStream,
    Ledger,
    Mixture,
    PairStream,
    Sample,
    ShardSource,
    StepLoader,
    TextStream,
    UnpairedStream,
    decode_image,
    packing,
    write_shards,
)

TOKENS_PER_TILE = 4
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def core_processor():
    words = ["<unk>", "<eos>", "user", "assistant", "yes", "what", *(str(i) for i in range(64))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    add_image_tokens(fast)
    images = HovleImageProcessor(tile_size=8, max_tiles=2)
    return HovleProcessor(images, fast, chat_template=TEMPLATE, tokens_per_tile=TOKENS_PER_TILE)


@pytest.fixture
def mixtures(tmp_path, png):
    def make(name: str, samples: list[Sample]) -> Mixture:
        write_shards(samples, tmp_path / name, samples_per_shard=5)
        return Mixture([(ShardSource(tmp_path / name), 1.0)], seed=0)

    parts = [{"type": "image"}, {"type": "text", "text": "what"}]
    messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": "yes"})
    wide = [png(i, (16, 8) if i % 2 else (8, 8)) for i in range(12)]  # two tiles and a thumbnail, or one tile
    return {
        "images": make("images", [Sample(f"i{i}", (data,)) for i, data in enumerate(wide)]),
        "texts": make(
            "texts", [Sample(f"t{i}", text=" ".join(map(str, range(i, i + 40)))) for i in range(12)]
        ),
        "pairs": make("pairs", [Sample(f"p{i}", (data,), f"{i} {i}") for i, data in enumerate(wide)]),
        "talks": make("talks", [Sample(f"c{i}", (data,), messages=messages) for i, data in enumerate(wide)]),
    }


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("kind", ["unpaired", "pairs", "conversations", "text"])
def test_from_shards_to_batches(core_processor, mixtures, kind, num_threads):
    ledger = Ledger(None, max_share=0, min_seen=0)
    common = {"processor": core_processor, "seed": 0, "max_tokens": 64, "ledger": ledger}
    stream = {
        "unpaired": lambda: UnpairedStream(
            mixtures["images"], mixtures["texts"], text_tokens=(2, 9), **common
        ),
        "pairs": lambda: PairStream(mixtures["pairs"], **common),
        "conversations": lambda: ConversationStream(mixtures["talks"], **common),
        "text": lambda: TextStream(mixtures["texts"], **common),
    }[kind]()
    loader = StepLoader(stream, 6, max_tokens=64, max_tiles=6, num_threads=num_threads)
    keys = set()
    with loader.iterate(0, 2) as steps:
        for _, batches, _ in steps:
            for batch in batches:
                tiles = 0 if batch.pixel_values is None else len(batch.pixel_values)
                image_tokens = int((batch.input_ids == core_processor.image_token_id).sum())
                assert image_tokens == tiles * TOKENS_PER_TILE == batch.num_tiles * TOKENS_PER_TILE
                assert not (batch.labels == core_processor.image_token_id).any()
                assert (batch.num_target_tokens == 0) == (kind == "unpaired")
                targets = batch.labels != IGNORE_INDEX
                assert torch.equal(batch.labels[targets], batch.input_ids[targets])
                assert tiles == 0 or batch.pixel_values.shape[1:] == (3, 8, 8)
                keys |= set(batch.keys)
    assert len(keys) == 12  # one epoch


def turn(*parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def answer(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = {  # messages, tiles of each image, what the answers say
    "turns": ((turn(None, "what"), answer("1"), turn("2"), answer("3 4")), [1], "1 <eos> 3 4 <eos>"),
    "images": (
        (turn(None, "what", None), answer("5"), turn(None), answer("6")),
        [1, 3, 1],
        "5 <eos> 6 <eos>",
    ),
    "text": (({"role": "user", "content": "7"}, answer("8")), [], "8 <eos>"),
    "open": ((turn("9"), answer("10"), turn("11")), [], "10 <eos>"),  # a question without its answer
}


def test_turns_images_and_text_only_in_one_row(core_processor, tmp_path, png):
    """What the batch says of each conversation: its answers are the targets, its pictures where serving puts them."""
    square, wide = png(1, (8, 8)), png(2, (16, 8))
    samples = [
        Sample(key, tuple(wide if n == 3 else square for n in tiles), messages=messages)
        for key, (messages, tiles, _) in CONVERSATIONS.items()
    ]
    write_shards(samples, tmp_path / "mixed")
    mixture = Mixture([(ShardSource(tmp_path / "mixed"), 1.0)], seed=0)
    stream = ConversationStream(mixture, core_processor, 0, 128, Ledger(None, max_share=0))
    (batch,) = StepLoader(stream, 4, max_tokens=256, max_tiles=16).batches(0)
    tokenizer = core_processor.tokenizer
    start = tile = 0
    for key, length in zip(batch.keys, batch.sample_lengths, strict=True):
        messages, tiles, said = CONVERSATIONS[key.removeprefix("mixed/")]
        row = slice(start, start + length)
        ids, labels = batch.input_ids[0, row], batch.labels[0, row]
        assert batch.position_ids[0, row].tolist() == list(range(length))
        assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == said
        assert torch.equal(ids[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX])
        pictures = [decode_image(image) for image in samples[list(CONVERSATIONS).index(key[6:])].images]
        for i, message in enumerate(
            messages
        ):  # every answer stands behind the prompt that serving would make
            if message["role"] == "assistant":
                before = messages[:i]
                seen = sum(part["type"] == "image" for m in before if m["role"] == "user" for part in m["content"]
                           if not isinstance(part, str))  # fmt: skip
                prompt = core_processor.encode(before, pictures[:seen], add_generation_prompt=True).input_ids
                assert ids[: len(prompt)].tolist() == prompt.tolist()
                assert labels[len(prompt)] != IGNORE_INDEX
        assert int((ids == core_processor.image_token_id).sum()) == sum(tiles) * TOKENS_PER_TILE
        assert batch.tile_keys[tile : tile + sum(tiles)] == [f"{key}#{n}" for n in range(sum(tiles))]
        start, tile = start + length, tile + sum(tiles)
    assert sorted(batch.keys) == sorted(f"mixed/{key}" for key in CONVERSATIONS)
    assert batch.num_tiles == tile == 6
    assert start == batch.num_tokens


def test_fast_tiles_are_cut_from_the_file_of_a_sample(core_processor, tmp_path, encode_image_file):
    """Same tokens and tiles, other pixels: those of a JPEG at a reduced scale, which need the file."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    data = encode_image_file(Image.fromarray(pixels).resize((320, 160)), "JPEG")
    write_shards([Sample("a", (data,), "7")], tmp_path / "shards")
    mixture = Mixture([(ShardSource(tmp_path / "shards"), 1)], 0)
    images = HovleImageProcessor(tile_size=8, max_tiles=2, fast=True)
    fast = HovleProcessor(
        images, core_processor.tokenizer, chat_template=TEMPLATE, tokens_per_tile=TOKENS_PER_TILE
    )
    one, other = (PairStream(mixture, p, 0, 64, Ledger(None)).get(0) for p in (core_processor, fast))
    assert np.array_equal(one.input_ids, other.input_ids)
    assert np.array_equal(one.tiles, core_processor.image_processor.tiles(decode_image(data)))
    assert np.array_equal(other.tiles, images.tiles_of_file(data))
    assert not np.array_equal(other.tiles, images.tiles(decode_image(data)))


def test_what_the_chat_template_refuses_is_a_bad_sample(core_processor, tmp_path):
    """Templates of released models raise jinja errors for roles in an order they do not know."""
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    )
    processor = HovleProcessor(
        core_processor.image_processor, core_processor.tokenizer, strict, core_processor.tokens_per_tile
    )
    messages = ({"role": "system", "content": "1"}, {"role": "user", "content": "2"}, answer("3"))
    write_shards([Sample("s", messages=messages)], tmp_path / "system")
    mixture = Mixture([(ShardSource(tmp_path / "system"), 1.0)], seed=0)
    stream = ConversationStream(mixture, processor, 0, 64, Ledger(tmp_path / "q.jsonl", max_share=1))
    assert stream.get(0) is None
    assert (
        "does not encode: the chat template refuses these messages: no system role"
        in (tmp_path / "q.jsonl").read_text()
    )


def test_both_packages_mean_the_same_by_no_target():
    assert packing.IGNORE_INDEX == IGNORE_INDEX
