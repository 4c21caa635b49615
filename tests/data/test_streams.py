"""Streams: position -> sample, stateless; what cannot be used is quarantined and never replaced."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from hovle_data.mixture import Mixture
from hovle_data.quarantine import Ledger, TooManyBadSamples
from hovle_data.schema import Sample
from hovle_data.shards import ShardSource, write_shards
from hovle_data.streams import ConversationStream, PairStream, TextStream, UnpairedStream

PICTURE = [1, 0, 0, 0, 0, 2]


class Listed(list):
    def __init__(self, name, samples):
        super().__init__(samples)
        self.name = name


def mixture(samples, name="src"):
    return Mixture([(Listed(name, samples), 1)], seed=0)


def talk(key, answer="yes", images=()):
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": "1 2"}]
    messages = [{"role": "user", "content": parts}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return Sample(key=key, images=images, messages=tuple(messages))


def same(a, b):
    if a is None or b is None:
        return a is b
    arrays = zip((a.input_ids, a.labels, a.tiles), (b.input_ids, b.labels, b.tiles), strict=True)
    return a.key == b.key and all(np.array_equal(x, y) for x, y in arrays)


def test_conversation(processor, png):
    stream = ConversationStream(mixture([talk("a", "5", (png(),))]), processor, 0, 64, Ledger())
    encoded = stream.get(0)
    assert encoded.key == "src/a"
    assert encoded.input_ids.tolist() == [*PICTURE, 11, 12, 15]
    assert encoded.labels.tolist() == [-100] * 8 + [15]
    assert encoded.tiles.shape == (1, 8, 8, 3)


def test_pair_takes_pairs_text_and_conversations(processor, png):
    samples = [Sample("p", (png(),), "5"), Sample("t", text="6"), talk("c", "7")]
    stream = PairStream(mixture(samples), processor, 0, 64, Ledger())
    by_key = {encoded.key: encoded for encoded in map(stream.get, range(3))}
    assert by_key["src/p"].input_ids.tolist() == [*PICTURE, 15, 3]
    assert by_key["src/p"].labels.tolist() == [-100] * 6 + [15, 3]
    assert by_key["src/t"].labels.tolist() == [16, 3]
    assert by_key["src/c"].labels.tolist() == [-100, -100, 17]


def test_text_windows_change_with_the_epoch(processor, texts):
    stream = TextStream(mixture(texts(1, words=100)), processor, 0, 20, Ledger())
    windows = [stream.get(k) for k in range(30)]
    assert all(len(w.input_ids) == 20 for w in windows)
    assert all(np.array_equal(w.input_ids, w.labels) for w in windows)
    assert all((np.diff(w.input_ids[:-1]) == 1).all() for w in windows)
    starts = {int(w.input_ids[0]) for w in windows}
    assert len(starts) > 10
    assert same(stream.get(7), windows[7])


def unpaired(processor, png, texts, seed=0, text_tokens=(3, 9), **kwargs):
    images = mixture([Sample(f"i{i}", (png(i),)) for i in range(6)], "images")
    return UnpairedStream(
        images, mixture(texts(8), "texts"), processor, seed, 64, Ledger(), text_tokens=text_tokens, **kwargs
    )


def test_unpaired_joins_a_picture_with_a_window_of_text(processor, png, texts):
    stream = unpaired(processor, png, texts)
    lengths, first, starts = set(), {True: 0, False: 0}, set()
    for k in range(200):
        encoded = stream.get(k)
        ids = encoded.input_ids.tolist()
        picture_first = ids[0] == 1
        assert (ids[:6] if picture_first else ids[-6:]) == PICTURE
        text = ids[6:] if picture_first else ids[:-6]
        assert 3 <= len(text) <= 9
        assert all(b - a == 1 or b == 3 for a, b in pairwise(text))  # consecutive words, or the end
        assert (encoded.labels == -100).all()
        assert len(encoded.labels) == len(ids)
        assert encoded.key.startswith("images/i")
        lengths.add(len(text))
        starts.add(text[0] % 1000)
        first[picture_first] += 1
    assert lengths == set(range(3, 10))
    assert len(starts) > 25
    assert min(first.values()) > 70
    keys = [stream.get(k).key for k in range(6)]
    assert sorted(keys) == [f"images/i{i}" for i in range(6)]  # each picture once an epoch


def test_unpaired_is_a_function_of_seed_and_position(processor, png, texts):
    one, two = unpaired(processor, png, texts), unpaired(processor, png, texts, cached_paragraphs=1)
    backwards = {k: two.get(k) for k in reversed(range(40))}
    assert all(same(one.get(k), backwards[k]) for k in range(40))
    other = unpaired(processor, png, texts, seed=1)
    assert not all(same(one.get(k), other.get(k)) for k in range(10))


def test_kept_tiles_change_nothing(processor, png, texts):
    plain, kept = unpaired(processor, png, texts), unpaired(processor, png, texts, tile_cache_bytes=2**20)
    assert all(same(plain.get(k), kept.get(k)) for k in [*range(20), *range(20)])


@pytest.mark.parametrize("num_texts", [200, 190])
def test_unpaired_does_not_bring_captions_back_to_their_pictures(processor, png, num_texts):
    """Pictures and texts of the same pairs, with one seed as recipes give it."""
    pictures = mixture([Sample(f"{i}", (png(i),)) for i in range(200)], "images")
    captions = mixture([Sample(f"{i}", text=f"{i}") for i in range(num_texts)], "texts")
    stream = UnpairedStream(pictures, captions, processor, 0, 64, Ledger(), text_tokens=(1, 1))
    together = 0
    for k in range(400):
        encoded = stream.get(k)
        (text,) = [token for token in encoded.input_ids[[0, -1]] if token > 2]
        together += encoded.key == f"images/{text - 10}"
    assert together < 12  # two are expected of chance


def test_unpaired_fits_the_budget_and_short_paragraphs(processor, png):
    images = mixture([Sample("i", (png(),))], "images")
    short = mixture([Sample("t", text="1 2")], "texts")
    stream = UnpairedStream(images, short, processor, 0, 64, Ledger(), text_tokens=(10, 20))
    assert len(stream.get(0).input_ids) == 6 + 3
    long = mixture([Sample("t", text=" ".join("1" * 100))], "texts")
    stream = UnpairedStream(images, long, processor, 0, 10, Ledger(), text_tokens=(20, 30))
    assert all(len(stream.get(k).input_ids) == 10 for k in range(5))
    with pytest.raises(ValueError, match="text_tokens"):
        UnpairedStream(images, long, processor, 0, 10, Ledger(), text_tokens=(5, 4))


def test_unusable_samples_are_none_and_named(processor, png, encode_image_file, tmp_path):
    good, noise = png(), encode_image_file(Image.effect_noise((32, 32), 50))
    samples = {
        "good": talk("good", "5", (good,)),
        "truncated": talk("truncated", "5", (noise[: len(noise) // 2],)),
        "zero": talk("zero", "5", (b"",)),
        "tags": Sample("tags", (), messages=talk("x", "5", (good,)).messages),
        "long": talk("long", "5 " * 100),
        "tiles": talk("tiles", "5", (good,) * 3),
        "silent": talk("silent", None),
        "prose": Sample("prose", text="5"),
    }
    ledger = Ledger(tmp_path / "q.jsonl", max_share=1)
    stream = ConversationStream(mixture(list(samples.values())), processor, 0, 64, ledger, max_tiles=2)
    got = [stream.get(k) for k in range(16)]
    assert [e.key for e in got if e is not None] == ["src/good"] * 2
    reasons = {
        r["key"]: r["reason"] for r in map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())
    }
    assert set(reasons) == set(samples) - {"good"}
    assert reasons["truncated"].startswith("image does not decode")
    assert reasons["zero"] == "empty image file"
    assert reasons["tags"] == "image tags and images differ: 1 tags, 0 images"
    assert reasons["long"] == "too long: 102 tokens > max_tokens 64"
    assert reasons["tiles"] == "too many tiles: 3 > max_tiles 2"
    assert reasons["silent"].startswith("nothing to learn")
    assert reasons["prose"] == "no conversation: the sample is text"
    assert (ledger.num_seen, ledger.num_bad) == (16, 14)


def many_turns(key, picture, turns=4):
    """Turn n asks about picture n and answers with the word n: 6 + 1 + 1 tokens and a tile each."""
    messages = []
    for n in range(turns):
        messages += [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "7"}]},
            {"role": "assistant", "content": str(n)},
        ]
    return Sample(key, (picture,) * turns, messages=tuple(messages))


@pytest.mark.parametrize(
    ("max_tokens", "max_tiles", "turns"),
    [(32, 9, 4), (31, 9, 3), (24, 9, 3), (23, 9, 2), (8, 9, 1), (7, 9, 0), (64, 2, 2), (64, 0, 0)],
)
def test_long_conversations_are_cut_behind_an_answer(processor, png, tmp_path, max_tokens, max_tiles, turns):
    ledger = Ledger(tmp_path / "q.jsonl", max_share=1)
    mix = mixture([many_turns("long", png())])
    stream = ConversationStream(mix, processor, 0, max_tokens, ledger, max_tiles, long_samples="truncate")
    encoded = stream.get(0)
    assert ledger.num_truncated == (0 < turns < 4)
    assert ledger.num_bad == (turns == 0)
    if turns == 0:  # not even the first turn: refused, with the length of the whole
        assert encoded is None
        reason = "too many tiles: 4 > max_tiles 0" if max_tiles == 0 else "too long: 32 tokens > max_tokens 7"
        assert f'"long", "reason": "{reason}"' in (tmp_path / "q.jsonl").read_text()
        return
    assert encoded.input_ids.tolist() == [t for n in range(turns) for t in [*PICTURE, 17, 10 + n]]
    assert encoded.labels[encoded.labels != -100].tolist() == [10 + n for n in range(turns)]
    assert len(encoded.tiles) == turns
    refusing = ConversationStream(mix, processor, 0, max_tokens, Ledger(None, 1.0), max_tiles)
    assert (refusing.get(0) is None) == (turns < 4)


def test_a_long_pair_has_no_turn_to_be_cut_at(processor, png):
    ledger = Ledger(None, max_share=1)
    stream = PairStream(
        mixture([Sample("p", (png(),), "1 " * 30)]), processor, 0, 20, ledger, long_samples="truncate"
    )
    assert stream.get(0) is None
    assert (ledger.num_bad, ledger.num_truncated) == (1, 0)
    with pytest.raises(ValueError, match="long_samples='cut'"):
        PairStream(stream.mixture, processor, 0, 20, ledger, long_samples="cut")


def test_bad_text_of_an_unpaired_sample_names_the_text(processor, png, tmp_path):
    ledger = Ledger(tmp_path / "q.jsonl", max_share=1)
    texts = mixture([Sample("t", text=" ")], "texts")
    stream = UnpairedStream(mixture([Sample("i", (png(),))], "images"), texts, processor, 0, 64, ledger)
    assert stream.get(0) is None
    assert (tmp_path / "q.jsonl").read_text() == '{"shard": "texts", "key": "t", "reason": "empty text"}\n'


def test_errors_of_the_processor_name_the_sample(png, tmp_path):
    class Refusing:
        def encode_text(self, text):
            raise ValueError("no eos token")

    ledger = Ledger(tmp_path / "q.jsonl", max_share=1)
    assert TextStream(mixture([Sample("t", text="x")]), Refusing(), 0, 8, ledger).get(3) is None
    assert '"t", "reason": "does not encode: no eos token"' in (tmp_path / "q.jsonl").read_text()


def test_damaged_shards_fail_the_run_above_the_share(processor, pairs, tmp_path):
    write_shards(pairs(100), tmp_path / "out", samples_per_shard=10)
    (tmp_path / "out" / "shard-000003.tar").unlink()
    mix = Mixture([(ShardSource(tmp_path / "out"), 1)], seed=0)
    tolerant = PairStream(mix, processor, 0, 64, Ledger(tmp_path / "q.jsonl", max_share=0.1, min_seen=100))
    assert sum(tolerant.get(k) is None for k in range(100)) == 10
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 10
    strict = PairStream(mix, processor, 0, 64, Ledger(None, max_share=0.05, min_seen=100))
    with pytest.raises(TooManyBadSamples, match=r"missing shard \(such as out/shard-000003\.tar"):
        list(map(strict.get, range(100)))


def test_max_tokens_must_leave_something_to_predict(processor):
    with pytest.raises(ValueError, match="max_tokens=1"):
        TextStream(mixture([Sample("t", text="x")]), processor, 0, 1, Ledger())
