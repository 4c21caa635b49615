"""Order is a function of the position: bijective, different for every seed and epoch, cheap to seek."""

import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hovle_data.mixture import MAX_BLOCK, Mixture
from hovle_data.order import Permutation, hash64, position_to_index, uniform
from hovle_data.schema import BadSample, Sample


class Numbers:
    """A source of n samples without contents, for orders alone."""

    def __init__(self, name: str, n: int) -> None:
        self.name, self.n = name, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Sample:
        return Sample(key=f"{self.name}{i}", text="words")


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 1200), st.integers(0, 2**64))
def test_permutation_is_a_bijection(n, seed):
    assert sorted(Permutation(n, seed)) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 1000, 1024, 1025, 9000])
def test_permutation_at_the_edges_of_powers_of_two(n):
    assert sorted(Permutation(n, seed=1)) == list(range(n))


def test_permutation_changes_with_the_seed_and_is_the_same_again():
    assert list(Permutation(100, 0)) == list(Permutation(100, 0))
    assert list(Permutation(100, 0)) != list(Permutation(100, 1))
    assert list(Permutation(100, 0)) != list(range(100))


@pytest.mark.parametrize("n", [2, 3, 5, 12, 100])
def test_every_index_is_about_equally_often_first(n):
    draws = 4000
    counts = Counter(Permutation(n, seed)(0) for seed in range(draws))
    chi_square = sum((counts[i] - draws / n) ** 2 / (draws / n) for i in range(n))
    assert chi_square < n - 1 + 5 * (2 * (n - 1)) ** 0.5 + 5


def test_permutation_is_not_nearly_the_identity():
    shuffled = list(Permutation(10_000, 3))
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(shuffled))
    in_place = sum(i == p for i, p in enumerate(shuffled))
    assert neighbours < 15
    assert in_place < 10


def test_positions_outside_are_refused():
    with pytest.raises(IndexError):
        Permutation(5, 0)(5)
    with pytest.raises(ValueError, match="n=0"):
        Permutation(0, 0)


def test_epochs_are_complete_and_differ():
    walk = [position_to_index(k, 50, seed=9) for k in range(150)]
    assert [epoch for epoch, _ in walk] == [0] * 50 + [1] * 50 + [2] * 50
    orders = [[i for epoch, i in walk if epoch == e] for e in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_seeking_into_a_million_is_immediate():
    def seconds() -> float:
        mixture = Mixture([(Numbers("a", 1_000_000), 0.7), (Numbers("b", 1_000_000), 0.3)], seed=0)
        start = time.perf_counter()
        mixture.draw(123_456_789)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.05


def test_hashes_are_fixed_for_ever():
    """Checkpoints name positions; these numbers must never change, on any Python or platform."""
    assert hash64("a", 1, 2) == int.from_bytes(bytes.fromhex("f583b5a0fe032ffa"), "big")
    assert [Permutation(10, 0)(i) for i in range(10)] == [4, 0, 8, 9, 7, 5, 2, 1, 6, 3]
    mixture = Mixture([(Numbers("a", 5), 2), (Numbers("b", 3), 1)], 0)
    assert [mixture.draw(k) for k in range(6)] == [
        (1, 0),
        (0, 1),
        (0, 4),
        (1, 1),
        (0, 3),
        (0, 2),
    ]


def test_uniform_covers_both_ends():
    assert {uniform(3, 6, "x", k) for k in range(200)} == {3, 4, 5, 6}
    with pytest.raises(ValueError, match="empty range"):
        uniform(2, 1)


def test_proportions_are_exact_in_every_block():
    mixture = Mixture([(Numbers("a", 7), 0.5), (Numbers("b", 11), 0.3), (Numbers("c", 13), 0.2)], seed=4)
    assert mixture.phases[0].counts == (5, 3, 2)
    for block in range(20):
        drawn = Counter(mixture.draw(block * 10 + p)[0] for p in range(10))
        assert drawn == {0: 5, 1: 3, 2: 2}


def test_blocks_are_shuffled_differently():
    mixture = Mixture([(Numbers("a", 7), 1), (Numbers("b", 11), 1), (Numbers("c", 13), 2)], seed=4)
    assert len({tuple(mixture.draw(4 * block + p)[0] for p in range(4)) for block in range(50)}) > 6


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.001, 100, allow_nan=False)), min_size=1, max_size=5),
    st.integers(0, 10**6),
)
def test_each_source_is_walked_in_whole_epochs(shape, seed):
    sources = [(Numbers(f"s{j}_", n), weight) for j, (n, weight) in enumerate(shape)]
    mixture = Mixture(sources, seed)
    walked: list[list[int]] = [[] for _ in sources]
    for k in range(300):
        j, i = mixture.draw(k)
        walked[j].append(i)
    for (source, _), order in zip(sources, walked, strict=True):
        for start in range(0, len(order), len(source)):
            epoch = order[start : start + len(source)]
            assert len(set(epoch)) == len(epoch)


def test_odd_weights_are_rounded_and_none_is_lost():
    mixture = Mixture(
        [(Numbers("big", 10), 1.0), (Numbers("tiny", 10), 1e-9), (Numbers("c", 10), 1 / 3)], seed=0
    )
    assert sum(mixture.phases[0].counts) == MAX_BLOCK
    assert mixture.phases[0].counts[1] == 1
    assert abs(mixture.phases[0].counts[0] / mixture.phases[0].counts[2] - 3) < 0.01


def test_a_share_that_rounding_changes_much_is_named(caplog):
    Mixture([(Numbers("big", 5), 1), (Numbers("small", 5), 1e-5)], 0)
    assert caplog.messages == ["small: its weight asks for 1e-05 of the draws and it gets 0.00024"]
    caplog.clear()
    Mixture([(Numbers("a", 5), 0.123), (Numbers("b", 5), 0.456789)], 0)
    assert caplog.messages == []


def test_a_curriculum_changes_the_shares_at_its_positions():
    mixture = Mixture(
        [(Numbers("a", 7), {0: 3, 8: 1}), (Numbers("b", 5), 1), (Numbers("c", 3), {8: 2})], seed=1
    )
    drawn = [mixture.names[mixture.draw(k)[0]] for k in range(24)]
    assert Counter(drawn[:8]) == {"a": 6, "b": 2}
    assert all(Counter(drawn[start : start + 4]) == {"a": 1, "b": 1, "c": 2} for start in range(8, 24, 4))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10**6))
def test_a_source_goes_on_where_its_earlier_phase_left_it(first, second, seed):
    """Also in the middle of a block, and after it was not drawn at all."""
    a, b = Numbers("a", 11), Numbers("b", 5)
    mixture = Mixture([(a, {0: 2, first: 0, first + second: 1}), (b, 1)], seed)
    walked: dict[int, list[int]] = {0: [], 1: []}
    for k in range(first + second + 40):
        j, i = mixture.draw(k)
        walked[j].append(i)
    for j, size in ((0, 11), (1, 5)):
        for start in range(0, len(walked[j]) - size + 1, size):
            assert sorted(walked[j][start : start + size]) == list(range(size))


def test_a_curriculum_that_never_changes_is_a_plain_weight():
    plain, same = (Mixture([(Numbers("a", 7), w), (Numbers("b", 5), 1)], 3) for w in (2, {0: 2}))
    assert [plain.draw(k) for k in range(30)] == [same.draw(k) for k in range(30)]


def test_weights_are_relative():
    counts = [
        Mixture([(Numbers("a", 5), a), (Numbers("b", 5), b)], 0).phases[0].counts
        for a, b in ((2, 1), (10, 5.0))
    ]
    assert counts == [(2, 1), (2, 1)]


@pytest.mark.parametrize(
    ("sources", "match"),
    [
        ([], "empty"),
        ([(Numbers("a", 0), 1)], "source a is empty"),
        ([(Numbers("a", 1), 0)], "weight of a is 0"),
        ([(Numbers("a", 1), float("nan"))], "weight of a is nan"),
        ([(Numbers("a", 1), 1), (Numbers("a", 1), 1)], "share a name"),
        ([(Numbers("a", 1), {0: 0, 5: 0.0})], "never drawn"),
        ([(Numbers("a", 1), {0: 1, 5: -1})], "may be negative"),
        ([(Numbers("a", 1), {-1: 1})], "may be negative"),
        ([(Numbers("a", 1), {3: 1}), (Numbers("b", 1), {5: 1})], "no source has a weight from position 0"),
    ],
)
def test_bad_mixtures_are_refused(sources, match):
    with pytest.raises(ValueError, match=match):
        Mixture(sources, seed=0)


def test_read_names_the_place_of_a_bad_sample():
    class Empty(Numbers):
        def __getitem__(self, i):
            return Sample(key=f"k{i}")

    with pytest.raises(BadSample, match="e: k0: no content"):
        Mixture([(Empty("e", 1), 1)], seed=0).read(5)


def test_light_modules_import_no_torch():
    modules = ["schema", "index", "records", "shards", "order", "mixture", "quarantine", "decode", "plugin"]
    code = f"import sys, hovle_data\nfor m in {modules}: __import__('hovle_data.' + m)\n"
    code += "bad = {'torch', 'transformers', 'webdataset'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)
