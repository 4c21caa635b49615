"""The streams on the real `HovleProcessor`: its contract, from shards to packed batches."""

import pytest
import torch
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


def test_both_packages_mean_the_same_by_no_target():
    assert packing.IGNORE_INDEX == IGNORE_INDEX
