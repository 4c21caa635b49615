"""StepLoader: any world size sees the same samples, any step can be the first, and its thread comes to an end."""

import gc
import threading
import time
from itertools import chain

import pytest
import torch

from hovle_data.mixture import Mixture
from hovle_data.pipeline import StepLoader
from hovle_data.quarantine import Ledger
from hovle_data.schema import Sample
from hovle_data.streams import PairStream


class Listed(list):
    name = "src"


@pytest.fixture
def stream(processor, pairs):
    return PairStream(Mixture([(Listed(pairs(48)), 1)], seed=3), processor, 3, 64, Ledger())


def loader(stream, **kwargs):
    return StepLoader(stream, **{"global_batch_size": 8, "max_tokens": 40, "max_tiles": 3, **kwargs})


def keys(batches):
    return sorted(key for batch in batches for key in batch.keys)


def producers():
    return [t for t in threading.enumerate() if t.name.startswith("hovle-data")]


def wait_until_no_producer(seconds=5.0):
    deadline = time.monotonic() + seconds
    while producers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not producers()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_together_are_one_rank(stream, world_size):
    one = loader(stream)
    ranks = [loader(stream, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(8):
        of_ranks = [keys(rank.batches(step)) for rank in ranks]
        assert sorted(chain(*of_ranks)) == keys(one.batches(step))
        assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1


@pytest.mark.parametrize("stop", range(7))
@pytest.mark.parametrize("worlds", [(1, 2), (2, 4), (4, 1), (1, 1)])
def test_an_epoch_is_every_sample_once_with_a_stop_anywhere(stream, stop, worlds):
    seen = []
    for world_size, steps in zip(worlds, [range(stop), range(stop, 6)], strict=True):
        for rank in range(world_size):
            ranked = loader(stream, rank=rank, world_size=world_size)
            seen += [key for step in steps for key in keys(ranked.batches(step))]
    assert sorted(seen) == [f"src/s{i:04d}" for i in range(48)]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_resuming_gives_the_same_batches(stream, num_threads):
    def run(start, stop):
        with loader(stream, num_threads=num_threads).iterate(start, stop) as steps:
            return list(steps)

    whole, resumed = run(0, 8), run(5, 8)
    assert [step for step, _, _ in whole] == list(range(8))
    for (step, batches, wait), (step2, batches2, _) in zip(whole[5:], resumed, strict=True):
        assert step == step2
        assert wait >= 0
        assert [b.keys for b in batches] == [b.keys for b in batches2]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, batches2, strict=True))
        assert all(
            torch.equal(a.pixel_values, b.pixel_values) for a, b in zip(batches, batches2, strict=True)
        )
    direct = loader(stream).batches(6)
    assert [b.keys for b in direct] == [b.keys for b in whole[6][1]]
    assert wait_until_no_producer()


def test_budgets_hold(stream):
    for batch in loader(stream).batches(0):
        assert batch.num_tokens <= 40
        assert batch.num_tiles <= 3


def test_quarantined_samples_are_left_out_the_same_way_every_time(processor, pairs):
    samples = [s if i % 4 else Sample(s.key, (b"",), s.text) for i, s in enumerate(pairs(16))]
    stream = PairStream(Mixture([(Listed(samples), 1)], seed=0), processor, 0, 64, Ledger(None, max_share=1))
    one, two = ([keys(loader(stream).batches(step)) for step in range(2)] for _ in range(2))
    assert one == two
    assert sorted(chain(*one)) == [f"src/s{i:04d}" for i in range(16) if i % 4]


def test_a_step_of_nothing_but_bad_samples_is_empty(processor):
    stream = PairStream(
        Mixture([(Listed([Sample("k", (b"",), "t")]), 1)], 0), processor, 0, 64, Ledger(None, 1.0)
    )
    with loader(stream).iterate(0, 2) as steps:
        assert [(step, batches) for step, batches, _ in steps] == [(0, []), (1, [])]


class Counting:
    """A stream that counts how far it was read."""

    def __init__(self, stream, fail_at=None, delay_s=0.0):
        self.stream, self.fail_at, self.delay_s, self.reads = stream, fail_at, delay_s, 0

    def get(self, k):
        self.reads += 1
        time.sleep(self.delay_s)
        if self.fail_at is not None and k >= self.fail_at:
            raise OSError(f"disk gone at {k}")
        return self.stream.get(k)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_errors_surface_in_the_consumer_at_their_step(stream, num_threads):
    counting = Counting(stream, fail_at=2 * 8)
    steps = loader(counting, num_threads=num_threads).iterate(0, 10)
    assert [next(steps)[0], next(steps)[0]] == [0, 1]
    with pytest.raises(OSError, match="disk gone at 16"):
        next(steps)
    with pytest.raises(StopIteration):
        next(steps)
    assert wait_until_no_producer()


def test_without_prefetch_nothing_is_read_ahead_and_the_steps_are_the_same(stream):
    counting = Counting(stream)
    with loader(stream).iterate(3, 6) as ahead, loader(counting, prefetch=0).iterate(3, 6) as inline:
        assert counting.reads == 0
        for n, (one, two) in enumerate(zip(inline, ahead, strict=True)):
            assert one[0] == two[0] == 3 + n
            assert [batch.keys for batch in one[1]] == [batch.keys for batch in two[1]]
            assert one[2] > 0
            assert counting.reads == 8 * (n + 1)
    assert list(inline) == []


def test_without_prefetch_errors_surface_at_their_step_and_closing_ends_it(stream):
    steps = loader(Counting(stream, fail_at=8), prefetch=0).iterate(0, 10)
    assert next(steps)[0] == 0
    with pytest.raises(OSError, match="disk gone at 8"):
        next(steps)
    with pytest.raises(StopIteration):
        next(steps)
    closed = loader(stream, prefetch=0).iterate()
    next(closed)
    closed.close()
    assert list(closed) == []


def test_prefetch_is_bounded(stream):
    counting = Counting(stream)
    with loader(counting, prefetch=2).iterate() as steps:
        next(steps)
        time.sleep(0.3)
        assert counting.reads <= 8 * (1 + 2 + 1)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("how", ["close", "with", "loader", "drop", "break"])
def test_the_thread_ends_with_its_consumer(stream, how, num_threads):
    made = loader(stream, num_threads=num_threads)
    steps = made.iterate()
    next(steps)
    assert producers()
    if how == "close":
        steps.close()
    elif how == "with":
        with steps:
            next(steps)
    elif how == "loader":
        with made:
            pass
    elif how == "drop":
        del steps
    else:
        for _ in steps:
            break
        del steps, _
    gc.collect()
    assert wait_until_no_producer()


def test_closing_does_not_wait_for_the_rest_of_a_long_step(stream):
    slow = Counting(stream, delay_s=0.1)
    steps = loader(slow, global_batch_size=100).iterate()
    time.sleep(0.15)
    start = time.monotonic()
    steps.close()
    assert time.monotonic() - start < 5
    assert not producers()
    assert list(steps) == []


def test_waiting_is_measured(stream):
    start = time.monotonic()
    with loader(Counting(stream, delay_s=0.1)).iterate(0, 1) as steps:
        ((_, _, wait),) = steps
    assert 0.05 < wait < time.monotonic() - start


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"global_batch_size": 1, "world_size": 2}, "global_batch_size=1 < world_size=2"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"prefetch": -1}, "prefetch=-1"),
    ],
)
def test_arguments(stream, kwargs, match):
    with pytest.raises(ValueError, match=match):
        loader(stream, **kwargs)
    with pytest.raises(ValueError, match="step=-1"):
        loader(stream).batches(-1)
