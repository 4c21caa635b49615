"""Shares of a step's samples by measured speed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hovle_train.balance import EVERY, Balance, BalancedLoader, split
from hovle_train.runtime import Runtime


class OfTwo(Runtime):
    """Rank 0 of two; the other is so many times as fast."""

    factor = 1.0

    def gather(self, value):
        return [value, value * self.factor]


@given(st.integers(0, 500), st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_shares_are_whole_in_proportion_and_complete(spare, speeds):
    total = spare + len(speeds)
    counts = split(total, speeds)
    assert sum(counts) == total
    assert min(counts) >= 1
    for count, speed in zip(counts, speeds, strict=True):
        assert abs(count - 1 - spare * speed / sum(speeds)) < 1 + 1e-9


def test_ranks_cover_every_position_of_a_step_once():
    balance = Balance(OfTwo(world_size=2), 10, ahead=3)
    balance._plan.append((4, [7, 3]))
    loaders = [
        BalancedLoader(
            balance, stream=None, global_batch_size=10, max_tokens=8, max_tiles=8, rank=rank, world_size=2
        )
        for rank in range(2)
    ]
    for step, counts in ((3, [5, 5]), (4, [7, 3]), (9, [7, 3])):
        positions = [list(loader.positions(step)) for loader in loaders]
        assert [len(own) for own in positions] == counts
        assert sorted([*positions[0], *positions[1]]) == list(range(step * 10, step * 10 + 10))


def test_shares_follow_speed_but_never_for_steps_that_may_be_prepared():
    runtime = OfTwo(world_size=2)
    runtime.factor = 3.0
    balance = Balance(runtime, 40, ahead=4)
    for step in range(EVERY):
        balance.add(step, tokens=100, seconds=0.1)
    assert balance.counts(EVERY + 3) == [20, 20]
    assert balance.counts(EVERY + 4) == split(40, [1, 3]) == [11, 29]
    assert balance.metrics(EVERY + 4) == {"smallest_share": 11 / 40, "largest_share": 29 / 40}


def test_a_rank_without_a_token_keeps_its_speed():
    balance = Balance(OfTwo(world_size=2), 40, ahead=0)
    for step in range(2 * EVERY):
        balance.add(step, tokens=100 if step < EVERY else 0, seconds=0.1)
    assert balance.counts(2 * EVERY) == [20, 20]


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"resources": {"balance": True}}, "does nothing with num_workers 1"),
        (
            {"resources": {"balance": True, "num_workers": 2}, "parallel": {"strategy": "fsdp2"}},
            "set parallel.strategy: ddp",
        ),
        (
            {
                "resources": {"balance": True, "num_workers": 2},
                "train": {"global_batch_size": None, "global_batch_rows": 2},
            },
            "set train.global_batch_size",
        ),
    ],
)
def test_what_cannot_be_balanced_is_refused(make_recipe, sections, reason):
    with pytest.raises(ValueError, match=f"resources.balance .*{reason}"):
        make_recipe("alignment", **sections)
