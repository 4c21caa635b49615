"""Packing keeps every token, both budgets and the borders between samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hovle_data.packing import pack


@pytest.fixture(scope="module")
def make():
    from dataclasses import dataclass

    @dataclass
    class Encoded:
        input_ids: np.ndarray
        labels: np.ndarray
        tiles: np.ndarray
        key: str = ""

    def make(number: int, length: int, num_tiles: int = 0) -> Encoded:
        ids = np.arange(length, dtype=np.int64) + 1000 * number
        labels = np.where(ids % 3 == 0, -100, ids)
        return Encoded(ids, labels, np.full((num_tiles, 2, 2, 3), number % 256, np.uint8), f"k{number}")

    return make


shapes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(shapes)
def test_nothing_is_lost_and_no_budget_exceeded(make, shape):
    samples = [make(i, length, tiles) for i, (length, tiles) in enumerate(shape)]
    batches = pack(samples, max_tokens=64, max_tiles=5)
    seen = {}
    for batch in batches:
        assert batch.num_tokens == sum(batch.sample_lengths) <= 64
        assert batch.num_tiles <= 5
        start = tile = 0
        for key, length in zip(batch.keys, batch.sample_lengths, strict=True):
            sample = samples[int(key[1:])]
            row = slice(start, start + length)
            assert batch.input_ids[0, row].tolist() == sample.input_ids.tolist()
            assert batch.position_ids[0, row].tolist() == list(range(length))
            assert batch.labels[0, start] == -100
            assert batch.labels[0, start + 1 : start + length].tolist() == sample.labels[1:].tolist()
            for t in range(len(sample.tiles)):
                assert batch.tile_keys[tile] == f"{key}#{t}"
                assert (batch.pixel_values[tile] == int(key[1:]) % 256).all()
                tile += 1
            seen[key] = True
            start += length
        assert batch.num_target_tokens == int((batch.labels != -100).sum())
        assert (batch.pixel_values is None) == (tile == 0)
        assert len(batch.tile_keys) == tile
    assert sorted(seen) == sorted(s.key for s in samples)
    assert sum(len(batch.keys) for batch in batches) == len(samples)


def test_types_and_shapes(make):
    (batch,) = pack([make(1, 5, 2), make(2, 3)], 64, 4)
    for tensor in (batch.input_ids, batch.position_ids, batch.labels):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (1, 8)
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.pixel_values.shape == (2, 3, 2, 2)
    assert batch.pixel_values.is_contiguous()
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.pixel_values.device.type == "meta"
    assert batch.input_ids.device.type == "cpu"
    assert pack([make(1, 5)], 64, 4)[0].to("meta").pixel_values is None


def test_tile_pixels_keep_their_place(make):
    sample = make(0, 3, 1)
    sample.tiles[0] = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    (batch,) = pack([sample], 8, 1)
    assert torch.equal(batch.pixel_values[0].permute(1, 2, 0), torch.from_numpy(sample.tiles[0]))


def test_labels_of_the_sample_are_not_touched(make):
    sample = make(1, 4)
    before = sample.labels.copy()
    pack([sample], 8, 1)
    assert (sample.labels == before).all()


def test_best_fit_fills_the_fullest_bin(make):
    batches = pack([make(i, length) for i, length in enumerate([60, 50, 40, 30, 10])], 100, 1)
    assert [sorted(b.sample_lengths) for b in batches] == [[40, 60], [10, 30, 50]]


def test_packing_wastes_little(make):
    lengths = np.random.default_rng(0).integers(10, 200, 400)
    batches = pack([make(i, int(n)) for i, n in enumerate(lengths)], 1024, 1)
    assert lengths.sum() / (1024 * len(batches)) > 0.97


def test_what_does_not_fit_is_named(make):
    with pytest.raises(ValueError, match="k7: 9 tokens > max_tokens=8"):
        pack([make(1, 2), make(7, 9)], 8, 1)
    with pytest.raises(ValueError, match="k7: 2 tiles > max_tiles=1"):
        pack([make(7, 3, 2)], 8, 1)
    with pytest.raises(ValueError, match="k7: input_ids is empty"):
        pack([make(7, 0)], 8, 1)
    assert pack([], 8, 1) == []


@pytest.mark.parametrize("length", [15, 16, 17])
def test_a_padded_row_holds_the_same_samples(make, length):
    (batch,) = pack([make(0, 7), make(1, length - 7)], max_tokens=64, max_tiles=1)
    padded = batch.padded(8, token_id=5)
    missing = padded.input_ids.shape[1] - length
    assert padded.input_ids.shape[1] % 8 == 0
    assert 0 <= missing < 8
    assert padded.num_tokens == batch.num_tokens == length
    assert padded.input_ids[0, length:].tolist() == [5] * missing
    assert padded.position_ids[0, length:].tolist() == list(range(missing))  # a sample of its own
    assert padded.labels[0, length:].tolist() == [-100] * missing
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(getattr(padded, name)[:, :length], getattr(batch, name))
