"""Both loaders: whatever the worlds before and after a stop, an epoch is every sample once. And rows are full."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hovle_data.mixture import Mixture
from hovle_data.order import hash64, uniform
from hovle_data.pipeline import StepLoader
from hovle_data.quarantine import Ledger
from hovle_data.rows import READ_SIZE, RowLoader
from hovle_data.shards import ShardSource, write_shards
from hovle_data.streams import PairStream

MAX_TOKENS, MAX_TILES = 64, 6
SHARED = [HealthCheck.function_scoped_fixture]  # the fixture is a class


class Sizes:
    """A stream of samples that are nothing but a position and a size; about one in `bad_every` is quarantined."""

    def __init__(self, encoded_type, seed=0, bad_every=7):
        self.encoded_type, self.seed, self.bad_every = encoded_type, seed, bad_every

    def is_bad(self, k):
        return self.bad_every > 0 and hash64("bad", self.seed, k) % self.bad_every == 0

    def get(self, k):
        if self.is_bad(k):
            return None
        ids = np.full(uniform(1, 40, "tokens", self.seed, k), k, np.int64)
        tiles = np.zeros((uniform(0, 3, "tiles", self.seed, k), 2, 2, 3), np.uint8)
        return self.encoded_type(ids, ids, tiles, str(k))


def make_loader(kind, stream, rank=0, world_size=1, num_threads=1):
    common = {"rank": rank, "world_size": world_size, "num_threads": num_threads}
    if kind == "samples":
        return StepLoader(stream, 12, MAX_TOKENS, MAX_TILES, **common)
    return RowLoader(stream, 4, MAX_TOKENS, MAX_TILES, **common)


def run(kind, stream, world_size, start, stop, state, num_threads=1):
    """All ranks over steps start..stop-1: (keys of each row, by step; the state of all ranks behind the last step)."""
    rows = {step: [] for step in range(start, stop)}
    merged = {}
    for rank in range(world_size):
        loader = make_loader(kind, stream, rank, world_size, num_threads)
        with loader.iterate(start, stop, state) as steps:
            for step, batches, _ in steps:
                rows[step] += [tuple(map(int, batch.keys)) for batch in batches]
            merged |= steps.state
    return rows, json.loads(json.dumps(merged))  # as it comes back from a checkpoint


worlds = st.sampled_from([1, 2, 4])


@pytest.mark.parametrize("kind", ["samples", "rows"])
@settings(max_examples=25, suppress_health_check=SHARED)
@given(st.integers(0, 9), worlds, worlds, st.sampled_from([1, 3]), st.integers(0, 10**6))
def test_an_epoch_is_every_sample_once_whatever_the_stop_and_the_worlds(
    encoded_type, kind, stop, before, after, threads, seed
):
    epoch, stream = 120, Sizes(encoded_type, seed)
    usable = [k for k in range(epoch) if not stream.is_bad(k)]
    seen, state, start = Counter(), {}, 0
    for world_size, until in ((before, stop), (after, 10 if kind == "samples" else 40)):
        rows, state = run(kind, stream, world_size, start, until, state, threads) if until else ({}, {})
        seen.update(k for row in rows.values() for keys in row for k in keys)
        start = until
    assert set(seen.values()) == {1}
    assert [k for k in sorted(seen) if k < epoch] == usable
    if kind == "samples":
        assert len(seen) == len(usable)  # ten steps are the epoch, to the sample


@pytest.mark.parametrize("kind", ["samples", "rows"])
@settings(max_examples=10, suppress_health_check=SHARED)
@given(st.integers(1, 7), worlds, worlds, st.integers(0, 10**6))
def test_a_stop_and_other_worlds_do_not_show_in_any_later_step(encoded_type, kind, stop, before, after, seed):
    stream = Sizes(encoded_type, seed)
    whole, last = run(kind, stream, 1, 0, 8, {})
    first, state = run(kind, stream, before, 0, stop, {}, num_threads=2)
    second, resumed_last = run(kind, stream, after, stop, 8, state)
    for step, rows in (first | second).items():
        if kind == "rows":
            assert sorted(rows) == sorted(whole[step])  # the very same rows
        assert sorted(k for row in rows for k in row) == sorted(k for row in whole[step] for k in row)
    assert resumed_last == last


def test_rows_on_the_same_world_come_in_the_same_order(encoded_type):
    stream = Sizes(encoded_type)
    whole, _ = run("rows", stream, 2, 0, 12, {})
    _, state = run("rows", stream, 2, 0, 5, {})
    resumed, _ = run("rows", stream, 2, 5, 12, state, num_threads=3)
    assert resumed == {step: rows for step, rows in whole.items() if step >= 5}


def test_from_shards_an_epoch_is_every_sample_once(processor, pairs, tmp_path):
    write_shards(pairs(200), tmp_path / "out", samples_per_shard=7)
    stream = PairStream(Mixture([(ShardSource(tmp_path / "out"), 1)], 5), processor, 5, 24, Ledger())
    seen, state = [], {}
    for world_size, start, stop in ((4, 0, 3), (2, 3, 4), (1, 4, 5)):
        merged = {}
        for rank in range(world_size):
            with RowLoader(stream, 4, 24, 9, rank, world_size, window=1).iterate(start, stop, state) as steps:
                seen += [key for _, batches, _ in steps for batch in batches for key in batch.keys]
            merged |= steps.state
        state = merged
    waiting = [stream.get(k).key for lane in state.values() for k in lane[1:]]
    assert len(set(seen)) == len(seen) == 5 * 4 * 2
    read = [stream.get(v + 4 * n).key for v, lane in state.items() for v in [int(v)] for n in range(lane[0])]
    assert sorted(seen + waiting) == sorted(read)  # nothing lost, nothing twice


def test_budgets_hold_and_rows_are_full(encoded_type):
    loader = make_loader("rows", Sizes(encoded_type))
    tokens = tiles = 0
    with loader.iterate(0, 50) as steps:
        for _, batches, _ in steps:
            assert len(batches) == 4
            for batch in batches:
                assert batch.num_tokens <= MAX_TOKENS
                assert batch.num_tiles <= MAX_TILES
                tokens += batch.num_tokens
                tiles += batch.num_tiles
    assert tokens / (200 * MAX_TOKENS) > 0.9
    assert tiles <= 200 * MAX_TILES


def test_no_sample_waits_longer_than_the_window(encoded_type):
    loader = RowLoader(Sizes(encoded_type, bad_every=0), 1, MAX_TOKENS, MAX_TILES, window=2)
    oldest_waiting = -1
    with loader.iterate(0, 200) as steps:
        for _, (row,), _ in steps:
            if oldest_waiting >= 0:
                assert int(row.keys[0]) == oldest_waiting
            num_read, *waiting = steps.state["0"]
            oldest_waiting = waiting[0] if waiting else num_read
            held = sum(len(loader.stream.get(k).input_ids) for k in waiting)
            assert held <= 2 * MAX_TOKENS + READ_SIZE * 40  # the window and one read


def test_the_next_read_begins_before_rows_are_taken(encoded_type):
    """Threads would stand still while a step is joined and waits for the consumer."""
    stream, asked = Sizes(encoded_type), []

    def read(positions):
        if positions:  # a lane has nothing to restore
            asked.append(positions)
        return map(stream.get, positions)

    _, state = next(make_loader("rows", stream).steps(0, {}, read))
    for lane, (num_read, *_) in state.items():
        own = [positions for positions in asked if positions[0] % 4 == int(lane)]
        assert own[-1] == range(int(lane) + 4 * num_read, int(lane) + 4 * (num_read + READ_SIZE), 4)
        assert len(own) == num_read // READ_SIZE + 1


def test_waiting_for_a_usable_sample_ends(encoded_type):
    loader = RowLoader(Sizes(encoded_type, bad_every=1), 2, MAX_TOKENS, MAX_TILES)
    with loader.iterate(0, 1) as steps, pytest.raises(ValueError, match="1024 samples in a row are bad"):
        next(steps)


def test_arguments_and_states_that_do_not_fit_are_refused(encoded_type):
    stream = Sizes(encoded_type)
    with pytest.raises(ValueError, match="global_batch_rows=4 does not divide by world_size=3"):
        RowLoader(stream, 4, MAX_TOKENS, MAX_TILES, world_size=3)
    with pytest.raises(ValueError, match="window=0"):
        RowLoader(stream, 4, MAX_TOKENS, MAX_TILES, window=0)
    for start, state in ((3, {}), (3, {"0": [16]}), (0, {"0": [16]})):
        steps = make_loader("rows", stream).iterate(start, 9, state)
        with pytest.raises(ValueError, match=f"step {start} needs the state of lanes 0..3"):
            next(steps)
